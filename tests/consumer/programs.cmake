# The programs of an application that uses tqai, each with flags that applications have; a program
# built for the processor that builds it, or without exported symbols, is at odds with a library that
# is neither. They are tests of the project that includes this.
include(CheckCXXCompilerFlag)
include(CheckCXXSourceRuns)
enable_testing()
set(sources ${CMAKE_CURRENT_LIST_DIR})

# tqai_program(NAME SOURCE [FLAGS...]): linked to tqai::tqai.
function(tqai_program name source)
  add_executable(${name} ${sources}/${source})
  target_link_libraries(${name} PRIVATE tqai::tqai)
  target_compile_options(${name} PRIVATE ${ARGN})
  add_test(NAME ${name} COMMAND ${name})
endfunction()

tqai_program(plain plain.cpp)
check_cxx_compiler_flag(-march=native takes_native)
if(takes_native)
  tqai_program(native beside_eigen.cpp -march=native)
else()
  tqai_program(native beside_eigen.cpp)
endif()
if(NOT MSVC)
  tqai_program(hidden beside_eigen.cpp -fvisibility=hidden -fvisibility-inlines-hidden)
  check_cxx_source_runs("int main() { return __builtin_cpu_supports(\"avx2\") ? 0 : 1; }" has_avx2)
  if(has_avx2)
    tqai_program(avx2 beside_eigen.cpp -O2 -mavx2 -mfma)
  endif()
endif()
