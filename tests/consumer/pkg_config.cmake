# cmake -DPREFIX=… -DPKG_CONFIG=… -DCXX=… -DWORK=… -DSOURCE=… -P pkg_config.cmake: builds
# SOURCE with what pkg-config says of the tqai installed at PREFIX, moved to another folder first,
# and runs it.
file(REMOVE_RECURSE ${WORK})
file(COPY ${PREFIX}/ DESTINATION ${WORK}/moved)
file(GLOB_RECURSE found ${WORK}/moved/tqai.pc)
get_filename_component(folder ${found} DIRECTORY)
set(ENV{PKG_CONFIG_PATH} ${folder})
set(ENV{LD_LIBRARY_PATH} ${folder}/..)
set(ENV{DYLD_LIBRARY_PATH} ${folder}/..)
foreach(static IN ITEMS "" --static)
  execute_process(COMMAND ${PKG_CONFIG} --cflags --libs ${static} tqai
                  OUTPUT_VARIABLE flags OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  message(STATUS "pkg-config --cflags --libs ${static} tqai: ${flags}")
  if(flags MATCHES "${PREFIX}/")
    message(FATAL_ERROR "tqai.pc names ${PREFIX}, where it no longer is")
  endif()
  separate_arguments(flags UNIX_COMMAND "${flags}")
  execute_process(COMMAND ${CXX} -std=c++20 ${SOURCE} -o ${WORK}/program ${flags}
                  COMMAND_ERROR_IS_FATAL ANY)
  execute_process(COMMAND ${WORK}/program COMMAND_ERROR_IS_FATAL ANY)
endforeach()
