# MOBA_HAS_CUDA: whether the cuda backend is built. MOBA_CUDA_ARCHITECTURES: what its portable kernels are compiled for, the
# newest as PTX too, for the GPUs to come; the kernels of sm_90a are apart (src/CMakeLists.txt).
set(MOBA_HAS_CUDA OFF)
if(NOT MOBA_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "MOBA_CUDA: is ${MOBA_CUDA}; allowed: AUTO, ON, OFF")
endif()
if(MOBA_CUDA STREQUAL OFF)
  return()
endif()

# Why there will be no cuda backend: an error where it was asked for, a remark where it was not.
macro(moba_no_cuda why)
  if(MOBA_CUDA STREQUAL ON)
    message(FATAL_ERROR "MOBA_CUDA: is ON, but ${why}. Put a newer nvcc on the PATH or set CUDACXX, or use MOBA_CUDA=OFF")
  endif()
  message(STATUS "Building without the cuda backend: ${why}")
  return()
endmacro()

if(NOT CMAKE_CUDA_COMPILER)
  if(DEFINED ENV{CUDACXX})
    set(CMAKE_CUDA_COMPILER "$ENV{CUDACXX}")
  else()
    find_program(MOBA_NVCC nvcc HINTS $ENV{CUDA_HOME}/bin /usr/local/cuda/bin)
    mark_as_advanced(MOBA_NVCC)
    if(NOT MOBA_NVCC)
      moba_no_cuda("nvcc was not found")
    endif()
    set(CMAKE_CUDA_COMPILER "${MOBA_NVCC}")
  endif()
endif()
# Asked before CMake tries it: an old one fails on the host's compiler already.
execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --version OUTPUT_VARIABLE nvcc_version ERROR_QUIET RESULT_VARIABLE failed)
string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" nvcc_version "${nvcc_version}")
set(nvcc_version "${CMAKE_MATCH_1}")
if(failed OR NOT nvcc_version OR nvcc_version VERSION_LESS 12.3)
  moba_no_cuda("${CMAKE_CUDA_COMPILER} is version '${nvcc_version}', and 12.3 or later is needed")
endif()
# Every target names its own.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES OFF)
endif()
include(CheckLanguage)
check_language(CUDA) # one that does not work with the host's compiler says so here
if(NOT CMAKE_CUDA_COMPILER)
  moba_no_cuda("nvcc does not compile with this C++ compiler (CMakeFiles/CMakeError.log says why)")
endif()
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
set(MOBA_HAS_CUDA ON)
set(known 80-real 90-real 100 120) # 100: no PTX of 120 runs on 10.3 and 11.0
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)
  set(known 80-real 90)
endif()
set(MOBA_CUDA_ARCHITECTURES ${known} CACHE STRING "What the portable kernels are compiled for, as CUDA_ARCHITECTURES of CMake")

# One target with kernels, for the architectures given.
function(moba_cuda_target target)
  target_compile_features(${target} PUBLIC cxx_std_20)
  set_target_properties(${target} PROPERTIES
    CUDA_ARCHITECTURES "${ARGN}" CXX_EXTENSIONS OFF
    CXX_VISIBILITY_PRESET hidden CUDA_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON POSITION_INDEPENDENT_CODE ON)
  target_include_directories(${target} PRIVATE ${PROJECT_SOURCE_DIR}/include ${PROJECT_SOURCE_DIR}/src)
  target_compile_definitions(${target} PRIVATE MOBA_BUILDING $<$<NOT:$<BOOL:${MOBA_SHARED}>>:MOBA_STATIC>)
  target_link_libraries(${target} PRIVATE CUDA::cudart_static)
  # -std=c++20: CMake 3.25 does not know that nvcc can. -Wpedantic would complain about what nvcc itself generates.
  set(warnings -Wall -Wextra -Wshadow)
  if(MOBA_WERROR)
    list(APPEND warnings -Werror)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--Werror=all-warnings>)
  endif()
  string(JOIN "," forwarded ${warnings})
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CXX>:${warnings} -Wno-restrict>
    $<$<COMPILE_LANGUAGE:CUDA>:-std=c++20 --expt-relaxed-constexpr -Xcompiler=${forwarded}>)
  if(MOBA_SANITIZE)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${MOBA_SANITIZE} -fno-omit-frame-pointer>)
  endif()
endfunction()
