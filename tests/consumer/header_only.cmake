# A program that compiles all of the library; header_only_test has two such files. HEADER_ONLY=read:
# its sources are read, to see whether all are there, which takes a fifth of the time.
if(HEADER_ONLY STREQUAL "read")
  add_library(header_only OBJECT ${CMAKE_CURRENT_LIST_DIR}/plain.cpp)
  target_compile_options(header_only PRIVATE -fsyntax-only)
else()
  add_executable(header_only ${CMAKE_CURRENT_LIST_DIR}/plain.cpp)
  target_compile_options(header_only PRIVATE $<$<CXX_COMPILER_ID:GNU,Clang>:-O0>)
  enable_testing()
  add_test(NAME header_only COMMAND header_only)
endif()
target_link_libraries(header_only PRIVATE tqai::header_only)
