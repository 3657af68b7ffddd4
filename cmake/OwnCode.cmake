# tqai_own_code(target [CXX14]): the settings of everything that this repository compiles, in C++20 or
# in C++14.
function(tqai_own_code target)
  if("CXX14" IN_LIST ARGN)
    set_target_properties(${target} PROPERTIES CXX_STANDARD 14)
  else()
    target_compile_features(${target} PRIVATE cxx_std_20)
  endif()
  set_target_properties(${target} PROPERTIES CXX_EXTENSIONS OFF)
  if(MSVC)
    target_compile_options(${target} PRIVATE /W4 /utf-8 $<$<BOOL:${TQAI_WERROR}>:/WX>)
  else()
    target_compile_options(${target} PRIVATE -Wall -Wextra -Wconversion -Wshadow
                                             $<$<BOOL:${TQAI_WERROR}>:-Werror>)
  endif()
  if(TQAI_SANITIZE)
    list(JOIN TQAI_SANITIZE "," sanitizers)
    target_compile_options(${target} PRIVATE -fsanitize=${sanitizers} -fno-sanitize-recover=all
                                             -fno-omit-frame-pointer)
    target_link_options(${target} PRIVATE -fsanitize=${sanitizers})
  endif()
endfunction()

# tqai_own_c_code(target): the same for what is written in C.
function(tqai_own_c_code target)
  if(MSVC)
    target_compile_options(${target} PRIVATE /W4 /utf-8 $<$<BOOL:${TQAI_WERROR}>:/WX>)
  else()
    target_compile_options(${target} PRIVATE -Wall -Wextra -pedantic
                                             $<$<BOOL:${TQAI_WERROR}>:-Werror>)
  endif()
  if(TQAI_SANITIZE)
    list(JOIN TQAI_SANITIZE "," sanitizers)
    target_compile_options(${target} PRIVATE -fsanitize=${sanitizers} -fno-sanitize-recover=all)
    target_link_options(${target} PRIVATE -fsanitize=${sanitizers})
  endif()
endfunction()
