# Whether the CUDA stages are built: by the presence of a toolkit, never of a GPU.
#
#   COMPRESSED_DDP_CUDA                AUTO (if a toolkit is found), ON or OFF
#   COMPRESSED_DDP_CUDA_ARCHITECTURES  of the kernels; the newest also as PTX, for GPUs that are newer still
#
# Sets COMPRESSED_DDP_HAS_CUDA.
set(COMPRESSED_DDP_CUDA
    AUTO
    CACHE STRING "Build the CUDA stages: AUTO (if a toolkit is found), ON or OFF")
set(COMPRESSED_DDP_CUDA_ARCHITECTURES
    80-real 90-real 100-real 120
    CACHE STRING "CUDA architectures of the kernels")
set(COMPRESSED_DDP_HAS_CUDA OFF)
if(COMPRESSED_DDP_CUDA STREQUAL "OFF")
  return()
endif()
if(CMAKE_VERSION VERSION_LESS 3.26) # hands no -std=c++20 to nvcc
  if(COMPRESSED_DDP_CUDA STREQUAL "ON")
    message(FATAL_ERROR "COMPRESSED_DDP_CUDA is ON, but CMake ${CMAKE_VERSION} cannot compile CUDA in C++20; pip install 'cmake>=3.26'")
  endif()
  message(STATUS "CUDA: CMake ${CMAKE_VERSION} is too old (3.26 or newer is needed), the CUDA stages are left out")
  return()
endif()

# Also where PATH does not lead: /usr/local/cuda/bin often is not in it.
find_program(
  COMPRESSED_DDP_NVCC nvcc
  HINTS ENV CUDA_HOME ENV CUDA_PATH /usr/local/cuda
  PATH_SUFFIXES bin)
if(NOT COMPRESSED_DDP_NVCC)
  if(COMPRESSED_DDP_CUDA STREQUAL "ON")
    message(FATAL_ERROR "COMPRESSED_DDP_CUDA is ON, but there is no nvcc in PATH, CUDA_HOME, CUDA_PATH "
                        "or /usr/local/cuda; install the CUDA toolkit (12.8 or newer) or name it in CUDA_HOME")
  endif()
  message(STATUS "CUDA: no toolkit found, the CUDA stages are left out")
  return()
endif()
set(CMAKE_CUDA_COMPILER ${COMPRESSED_DDP_NVCC})
set(CMAKE_CUDA_ARCHITECTURES 90) # for the compiler's own test; every target names its own
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
if(CUDAToolkit_VERSION VERSION_LESS 12.8) # C++20 and the architectures 100 and 120
  if(COMPRESSED_DDP_CUDA STREQUAL "ON")
    message(FATAL_ERROR "CUDA toolkit ${CUDAToolkit_VERSION} in ${COMPRESSED_DDP_NVCC} is too old, expected 12.8 or newer")
  endif()
  message(STATUS "CUDA: toolkit ${CUDAToolkit_VERSION} is too old (12.8 or newer is needed), the CUDA stages are left out")
  return()
endif()
message(STATUS "CUDA: toolkit ${CUDAToolkit_VERSION}, architectures ${COMPRESSED_DDP_CUDA_ARCHITECTURES}")
set(COMPRESSED_DDP_HAS_CUDA ON)
