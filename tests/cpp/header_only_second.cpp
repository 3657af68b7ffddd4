// See header_only_first.cpp. Any header of the library may come first.
#include <tqai/sequences.hpp>

#include "files_test.cpp"
#include "guest_test.cpp"
#include "quantizer_test.cpp"
