# cmake -DNM=… -DLIBRARY=… -P symbols.cmake: fails where the compiled library defines symbols of Eigen.
# They are weak, and an application built for another processor has its own of the same names with
# another alignment: the linker keeps one of the two.
set(dynamic)
if(NOT LIBRARY MATCHES "\\.(a|lib)$")
  set(dynamic -D)
endif()
execute_process(COMMAND ${NM} -C ${dynamic} ${LIBRARY}
                OUTPUT_VARIABLE symbols ERROR_QUIET COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "[^\n]*tqai::KvCache::append[^\n]*" own "${symbols}")
if(NOT own)
  message(FATAL_ERROR "${LIBRARY} does not even define KvCache::append: were its symbols read?")
endif()
string(REGEX MATCHALL "[^\n]* [TtWwVvuBbDdRr] [^\n]*Eigen[^\n]*" foreign "${symbols}")
if(foreign)
  list(LENGTH foreign count)
  list(SUBLIST foreign 0 5 some)
  list(JOIN some "\n  " text)
  message(FATAL_ERROR "${LIBRARY} defines ${count} symbols of Eigen, such as\n  ${text}")
endif()
