# Finds Eigen for <tqai/eigen.hpp>; what does not include it needs none. Included by tqai's own build
# and, installed, by find_package(tqai). No version is asked of Eigen: its package refuses requests of
# another major version than its own, and both 3.4 and 5 will do.
find_package(Eigen3 CONFIG QUIET)
if(NOT Eigen3_FOUND)
  message(STATUS "tqai: Eigen was not found; <tqai/eigen.hpp> needs Eigen 3.4 or newer")
elseif(Eigen3_VERSION VERSION_LESS 3.4)
  message(FATAL_ERROR "tqai needs Eigen 3.4 or newer; ${Eigen3_DIR} is ${Eigen3_VERSION}. Point "
                      "Eigen3_DIR to another, or set CMAKE_DISABLE_FIND_PACKAGE_Eigen3=ON and do "
                      "without <tqai/eigen.hpp>")
endif()
