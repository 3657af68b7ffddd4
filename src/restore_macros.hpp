// See hide_macros.hpp.
#pragma pop_macro("far")
#pragma pop_macro("max")
#pragma pop_macro("min")
#pragma pop_macro("near")
#pragma pop_macro("small")
#pragma pop_macro("check")
