// Macros of platforms' headers that are names in the sources, put away: <windows.h> has the first
// five, Apple's <AssertMacros.h> the last. restore_macros.hpp ends what this begins.
#pragma push_macro("far")
#pragma push_macro("max")
#pragma push_macro("min")
#pragma push_macro("near")
#pragma push_macro("small")
#pragma push_macro("check")
#undef far
#undef max
#undef min
#undef near
#undef small
#undef check
