# Compiles CUDA C++ to PTX for tests. CMake's CUDA language stays off: it would look for a GPU's toolkit on every machine, and here
# nothing but the PTX is wanted, which nvcc writes on any machine.
find_program(COMPRESSED_DDP_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH /usr/local/cuda PATH_SUFFIXES bin)
if(COMPRESSED_DDP_NVCC)
  message(STATUS "nvcc: ${COMPRESSED_DDP_NVCC}")
else()
  message(STATUS "nvcc: none; tests that run compiled kernels skip themselves (name one with -DCOMPRESSED_DDP_NVCC=...)")
endif()

# compressed_ddp_add_ptx(<target> <source.cu> <architecture> [<flag>...])
#
# Writes <source>.sm_<architecture>.ptx to ptx/ in the current binary folder, and makes <target> depend on it. Only where
# COMPRESSED_DDP_NVCC was found.
function(compressed_ddp_add_ptx target source architecture)
  get_filename_component(source_path ${source} ABSOLUTE)
  get_filename_component(stem ${source} NAME_WE)
  set(ptx ${CMAKE_CURRENT_BINARY_DIR}/ptx/${stem}.sm_${architecture}.ptx)
  file(MAKE_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/ptx)
  add_custom_command(
    OUTPUT ${ptx}
    COMMAND ${COMPRESSED_DDP_NVCC} -ptx -lineinfo -std=c++20 -O3 -arch=compute_${architecture} ${ARGN}
            -MD -MF ${ptx}.d -MT ${ptx} -o ${ptx} ${source_path}
    DEPENDS ${source_path}
    DEPFILE ${ptx}.d
    COMMENT "Compiling ${source} to PTX for compute_${architecture}"
    VERBATIM)
  add_custom_target(${target}_${stem}_sm_${architecture} DEPENDS ${ptx})
  add_dependencies(${target} ${target}_${stem}_sm_${architecture})
endfunction()
