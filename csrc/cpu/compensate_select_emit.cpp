#include "compensate_select_emit.h"

namespace compressed_ddp {

EmitResult emit_portable(const EmitArguments& arguments) {
  EmitResult result;
  EmitProgress at{.ties = arguments.ties};
  emit_scalar(arguments, arguments.count, at, result.sent_sq);
  result.rejected_sq = emit_rejected(arguments, at);
  return result;
}

EmitKernel best_emit() {
#if COMPRESSED_DDP_X86
  static const EmitKernel best = [] {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") ? emit_avx2 : emit_portable;
  }();
  return best;
#else
  return emit_portable;
#endif
}

} // namespace compressed_ddp
