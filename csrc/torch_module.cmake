# A Python module against the torch that Python imports. Defines compressed_ddp_torch_module(target), and `torch_version`.
find_package(Python 3.11 QUIET COMPONENTS Interpreter Development.Module)
if(NOT Python_Interpreter_FOUND)
  message(FATAL_ERROR "compressed_ddp needs Python 3.11 or newer; name one with "
                      "-DPython_EXECUTABLE=..., or add -DCOMPRESSED_DDP_PYTHON=OFF")
endif()
if(NOT Python_Development.Module_FOUND)
  message(FATAL_ERROR "${Python_EXECUTABLE} has no Python.h; install its headers "
                      "(Debian, Ubuntu: apt install python3-dev)")
endif()

# Not find_package(Torch): it enables CUDA and fails where a CUDA build of torch meets a machine
# without the toolkit.
execute_process(
  COMMAND ${Python_EXECUTABLE} ${PROJECT_SOURCE_DIR}/build_backend/find_torch.py
  OUTPUT_VARIABLE torch_facts
  ERROR_VARIABLE torch_error
  RESULT_VARIABLE torch_result
  OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_STRIP_TRAILING_WHITESPACE)
if(NOT torch_result EQUAL 0)
  message(FATAL_ERROR " ${torch_error}") # the space keeps it on one line
endif()
string(REPLACE "\n" ";" torch_facts "${torch_facts}")
list(GET torch_facts 0 torch_folder)
list(GET torch_facts 1 torch_version)
message(STATUS "compressed_ddp ${COMPRESSED_DDP_VERSION}, torch ${torch_version} in ${torch_folder}")

include(CheckCXXCompilerFlag)
check_cxx_compiler_flag(-fopenmp COMPRESSED_DDP_HAS_OPENMP_FLAG)

# What engine_device.cpp and its parts need is added by the caller: a module may have another device_cuda.
set(module_sources
    bucket.cpp collectives.cpp engine.cpp engine_exchange.cpp engine_state.cpp exchange_allgather.cpp exchange_hierarchical.cpp
    exchange_split.cpp module.cpp ops.cpp residuals.cpp shard_stages.cpp stages_cpu.cpp)
list(TRANSFORM module_sources PREPEND ${PROJECT_SOURCE_DIR}/csrc/)
set(COMPRESSED_DDP_DEVICE_SOURCES ${PROJECT_SOURCE_DIR}/csrc/device_report.cpp ${PROJECT_SOURCE_DIR}/csrc/device_stream.cpp
    ${PROJECT_SOURCE_DIR}/csrc/engine_device.cpp ${PROJECT_SOURCE_DIR}/csrc/shard_stages_device.cpp
    ${PROJECT_SOURCE_DIR}/csrc/stages_device.cpp)

function(compressed_ddp_torch_module target)
  Python_add_library(${target} MODULE WITH_SOABI ${module_sources})
  compressed_ddp_configure(${target})
  # torch's own pybind11 lies in include/: any other copy could not exchange objects with torch, so it
  # stands BEFORE the folders of Python, where such a copy may lie.
  target_include_directories(${target} SYSTEM BEFORE
                             PRIVATE ${torch_folder}/include ${torch_folder}/include/torch/csrc/api/include)
  target_link_libraries(${target} PRIVATE compressed_ddp_core)
  # No find_library: it would keep the paths in the cache after another torch was installed.
  foreach(name IN ITEMS torch_python torch torch_cpu c10)
    set(library ${torch_folder}/lib/${CMAKE_SHARED_LIBRARY_PREFIX}${name}${CMAKE_SHARED_LIBRARY_SUFFIX})
    if(NOT EXISTS ${library})
      message(FATAL_ERROR "compressed_ddp: ${library} is missing; reinstall torch")
    endif()
    target_link_libraries(${target} PRIVATE ${library})
  endforeach()
  if(NOT APPLE)
    # libtorch_cpu of a CUDA torch refers to CUDA libraries that the linker cannot find here.
    target_link_options(${target} PRIVATE LINKER:--allow-shlib-undefined)
  endif()
  target_compile_definitions(
    ${target} PRIVATE TORCH_EXTENSION_NAME=_C COMPRESSED_DDP_VERSION="${COMPRESSED_DDP_VERSION}"
                      COMPRESSED_DDP_TORCH_VERSION="${torch_version}")
  # at::parallel_for is a template of torch's headers: without this flag it compiles to a serial loop. Only compiled, not linked:
  # the OpenMP runtime is the one that libtorch_cpu brings, and a second one would have a second pool of threads.
  if(COMPRESSED_DDP_HAS_OPENMP_FLAG AND NOT APPLE)
    target_compile_options(${target} PRIVATE -fopenmp)
  endif()
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # g++ 12 reports torch's headers here although they are SYSTEM: it inlines first, then warns.
    target_compile_options(${target} PRIVATE -Wno-maybe-uninitialized)
  endif()
endfunction()
