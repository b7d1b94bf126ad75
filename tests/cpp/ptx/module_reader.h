// Reads the PTX text that nvcc emits (64-bit, ISA 9.0 and older).
#pragma once

#include <string>
#include <string_view>

#include "module.h"

namespace simt::ptx {

// `name` is for messages. Throws Failure(kUnsupported) with the line and its text at the first thing that it does not know.
// Left out knowingly: performance directives (.minnctapersm, .pragma, ...), linkage (.visible, .weak), debug sections.
Module read_module(std::string_view text, const std::string& name);

} // namespace simt::ptx
