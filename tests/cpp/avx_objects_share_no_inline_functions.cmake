# Fails if an AVX object of LIBRARY defines a weak symbol. Arguments: -DNM=... -DLIBRARY=...
execute_process(
  COMMAND ${NM} -A -C --defined-only ${LIBRARY}
  OUTPUT_VARIABLE symbols
  COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "[^\n]*_avx[0-9]+\\.cpp[^\n]*" avx_symbols "${symbols}")
if(NOT avx_symbols)
  message(FATAL_ERROR "no AVX object found in ${LIBRARY}")
endif()
string(REGEX MATCHALL "[^\n]*_avx[0-9]+\\.cpp[^\n]* [VWu] [^\n]*" weak_symbols "${symbols}")
if(weak_symbols)
  list(JOIN weak_symbols "\n  " weak_symbols)
  message(FATAL_ERROR "functions shared with objects for any CPU (make them static, or in an "
                      "unnamed namespace):\n  ${weak_symbols}")
endif()
