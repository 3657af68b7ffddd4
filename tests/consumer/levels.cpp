// A file beside another that includes tqai.
#include <cstddef>
#include <tqai/cpu.hpp>

std::size_t levels();
std::size_t levels() { return tqai::available_levels().size(); }
