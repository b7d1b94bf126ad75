// Declarations of variables and parameters, which modules and functions share.
#pragma once

#include "cursor.h"
#include "module.h"

namespace simt::ptx {

// Reads ".shared .align 16 .b8 name[64] = {...}, other;" with the cursor at the directive of the space. `is_extern` makes an array of
// unknown length in shared memory the dynamic one.
std::vector<Variable> read_variables(Cursor& cursor, bool is_extern);

// Reads "(.param .u64 .ptr .global .align 4 name, ...)" with the cursor at the parenthesis.
std::vector<Variable> read_parameters(Cursor& cursor);

Type read_type(Cursor& cursor); // ".u32"

// 0f3F800000, 0d..., or an integer with an optional sign.
struct Number {
  uint64_t bits;
  NumberKind kind;
};
std::optional<Number> accept_number(Cursor& cursor);

} // namespace simt::ptx
