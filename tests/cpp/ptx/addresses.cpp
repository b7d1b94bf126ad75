#include "addresses.h"

#include <cstdio>

#include "code_builder.h"
#include "memory.h"

namespace simt::ptx {
namespace {

std::string show(const std::byte* p, size_t bytes) {
  char text[64];
  std::snprintf(text, sizeof text, "access of %zu bytes at %p", bytes, static_cast<const void*>(p));
  return text;
}

} // namespace

AddressSpace take_address_space(Decoder& d) {
  if (d.take("global")) return AddressSpace::kGlobal;
  // A cluster of one block, the only one there is here, has the shared memory of that block.
  if (d.take("shared") || d.take("shared::cta") || d.take("shared::cluster")) return AddressSpace::kShared;
  if (d.take("local") || d.take("param") || d.take("param::entry") || d.take("param::func")) return AddressSpace::kPrivate;
  if (d.take("const")) return AddressSpace::kConst;
  return AddressSpace::kGeneric;
}

void check_extent(Decoder& d, const Operand& address, size_t bytes) {
  if (address.kind != OperandKind::kAddress || address.elements[0].kind != OperandKind::kVariable) return;
  const Variable& variable = d.builder().variable(address.elements[0].variable);
  const bool fits = address.displacement >= 0 && static_cast<uint64_t>(address.displacement) + bytes <= variable.bytes;
  if (variable.space != StateSpace::kDynamicShared && !fits) d.fail("an access beyond the end of " + variable.name);
}

void fail_misaligned(const std::byte* p, size_t bytes, const Location& at) {
  fail(FailureKind::kMisaligned, "misaligned " + show(p, bytes), at);
}

void fail_private(const std::byte* p, size_t bytes, const Location& at) {
  fail(FailureKind::kOutOfBounds, show(p, bytes) + ", which is not in the thread's local memory", at);
}

void check_const(const std::byte* p, size_t bytes, const Location& at) {
  if (!is_allocated(p, bytes)) fail(FailureKind::kOutOfBounds, show(p, bytes) + ", which is not in constant memory", at);
}

} // namespace simt::ptx
