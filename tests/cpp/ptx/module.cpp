#include "module.h"

#include <iterator>

namespace simt::ptx {

std::optional<Type> type_named(std::string_view name) {
  for (size_t i = 0; i < std::size(kTypeNames); ++i)
    if (name == kTypeNames[i]) return static_cast<Type>(i);
  return std::nullopt;
}

size_t bytes_of(Type type) {
  switch (type) {
    case Type::kU8:
    case Type::kS8:
    case Type::kB8:
    case Type::kPredicate:
      return 1;
    case Type::kU16:
    case Type::kS16:
    case Type::kB16:
    case Type::kF16:
    case Type::kBF16:
      return 2;
    case Type::kU64:
    case Type::kS64:
    case Type::kB64:
    case Type::kF64:
      return 8;
    case Type::kB128:
      return 16;
    default:
      return 4;
  }
}

const Function* Module::function(const std::string& wanted) const {
  const Function* declared = nullptr; // a declaration may stand before the definition
  for (const Function& function : functions)
    if (function.name == wanted && (function.is_defined || declared == nullptr)) declared = &function;
  return declared;
}

} // namespace simt::ptx
