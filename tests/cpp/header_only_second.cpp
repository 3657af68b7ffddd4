// See header_only_first.cpp.
#include "files_test.cpp"
#include "guest_test.cpp"
#include "quantizer_test.cpp"
