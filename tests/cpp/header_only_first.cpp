// Tests whose file compiles the library; header_only_second.cpp is linked to it, and does so as
// well.
#include "attend_test.cpp"
#include "golden_test.cpp"
#include "main.cpp"
#include "serialize_test.cpp"
