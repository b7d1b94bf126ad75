// Floating point forms of the opcodes that integers have too.
#pragma once

#include "decoder.h"

namespace simt::ptx {

Execute decode_float_add(Decoder& d);
Execute decode_float_subtract(Decoder& d);
Execute decode_float_multiply(Decoder& d);
Execute decode_float_fma(Decoder& d);
Execute decode_float_divide(Decoder& d);
Execute decode_float_minimum(Decoder& d);
Execute decode_float_maximum(Decoder& d);
Execute decode_float_negate(Decoder& d);
Execute decode_float_absolute(Decoder& d);

// Of add, subtract, multiply and fma of f16, bf16 and their pairs (instructions_half.cpp).
Execute decode_half_arithmetic(Decoder& d);
Execute decode_half_extremum(Decoder& d);
Execute decode_half_sign(Decoder& d);

float add_of_global_atomic(float a, float b); // atom.add.f32 on global memory flushes subnormal numbers, on shared memory not
float add_of_atomic(float a, float b);
double add_of_atomic(double a, double b);
uint16_t add_of_atomic_half(bool is_bfloat16, uint16_t a, uint16_t b);

} // namespace simt::ptx
