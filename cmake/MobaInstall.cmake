# Installs the library, its headers, the CMake package (find_package(moba) gives moba::moba) and the pkg-config file.
# Everything installed can be moved: no file holds the prefix unless the folders are absolute.
include(CMakePackageConfigHelpers)

install(TARGETS moba EXPORT mobaTargets
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}
  ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR}
  RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR}
  INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(DIRECTORY ${PROJECT_SOURCE_DIR}/include/moba DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} FILES_MATCHING PATTERN "*.h")

# The CMake package. A static library needs hwy and TBB at the user's link; a shared one brings them along by itself.
set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/moba)
configure_package_config_file(${PROJECT_SOURCE_DIR}/cmake/mobaConfig.cmake.in ${PROJECT_BINARY_DIR}/mobaConfig.cmake
  INSTALL_DESTINATION ${package_dir} NO_SET_AND_CHECK_MACRO)
# Before 1.0 a new minor version may change the interface.
write_basic_package_version_file(${PROJECT_BINARY_DIR}/mobaConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(EXPORT mobaTargets NAMESPACE moba:: DESTINATION ${package_dir})
install(FILES ${PROJECT_BINARY_DIR}/mobaConfig.cmake ${PROJECT_BINARY_DIR}/mobaConfigVersion.cmake
  DESTINATION ${package_dir})

# moba.pc. The prefix is found from where the file lies; an absolute folder (-DCMAKE_INSTALL_LIBDIR=/...) is kept as given.
if(IS_ABSOLUTE "${CMAKE_INSTALL_LIBDIR}")
  set(pc_prefix "${CMAKE_INSTALL_PREFIX}")
  set(pc_libdir "${CMAKE_INSTALL_LIBDIR}")
else()
  file(RELATIVE_PATH pc_up "/prefix/${CMAKE_INSTALL_LIBDIR}/pkgconfig" "/prefix")
  string(REGEX REPLACE "/$" "" pc_up "${pc_up}")
  set(pc_prefix "\${pcfiledir}/${pc_up}")
  set(pc_libdir "\${prefix}/${CMAKE_INSTALL_LIBDIR}")
endif()
if(IS_ABSOLUTE "${CMAKE_INSTALL_INCLUDEDIR}")
  set(pc_includedir "${CMAKE_INSTALL_INCLUDEDIR}")
else()
  set(pc_includedir "\${prefix}/${CMAKE_INSTALL_INCLUDEDIR}")
endif()
set(pc_libs_private "")
if(MOBA_SHARED)
  set(pc_cflags "")
  set(pc_requires_private "")
else()
  if(MOBA_HAS_CUDA)
    set(pc_libs_private " -L${CUDAToolkit_LIBRARY_DIR} -lcudart_static -lpthread -ldl -lrt")
  endif()
  set(pc_cflags " -DMOBA_STATIC")
  set(pc_requires_private "tbb libhwy")
endif()
configure_file(${PROJECT_SOURCE_DIR}/cmake/moba.pc.in ${PROJECT_BINARY_DIR}/moba.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/moba.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)

# The installed program (tools/) finds the library beside itself.
if(TARGET moba_cli)
  file(RELATIVE_PATH bin_to_lib "${CMAKE_INSTALL_FULL_BINDIR}" "${CMAKE_INSTALL_FULL_LIBDIR}")
  set_target_properties(moba_cli PROPERTIES INSTALL_RPATH "$ORIGIN/${bin_to_lib}")
endif()
