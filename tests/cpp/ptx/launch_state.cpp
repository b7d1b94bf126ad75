#include "launch_state.h"

#include <algorithm>
#include <cstring>

namespace simt::ptx {
namespace {

// Of a thread whose functions call each other in a circle; as CUDA, which gives 1 KiB unless told otherwise, but with room to spare.
constexpr size_t kStackOfRecursion = 256 << 10;

// The functions that `function` may call, itself included; and how many bytes its frames take at most, 0 if there is no bound.
class CallGraph {
 public:
  CallGraph(const std::vector<Code>& functions, uint32_t root) : functions_(functions), state_(functions.size()), depth_(functions.size()) {
    visit(root);
    private_bytes_ = recursive_ ? kStackOfRecursion : depth_[root];
  }
  const std::vector<uint32_t>& reachable() const { return reachable_; }
  size_t private_bytes() const { return private_bytes_; }

 private:
  enum class State : uint8_t { kUnseen, kOpen, kDone };

  void visit(uint32_t function) {
    state_[function] = State::kOpen;
    reachable_.push_back(function);
    size_t deepest = 0;
    for (const CallSite& call : functions_[function].calls) {
      if (call.callee == CallSite::kNone) continue;
      if (state_[call.callee] == State::kOpen)
        recursive_ = true;
      else if (state_[call.callee] == State::kUnseen)
        visit(call.callee);
      deepest = std::max(deepest, depth_[call.callee]);
    }
    depth_[function] = functions_[function].frame_bytes() + deepest;
    state_[function] = State::kDone;
  }

  const std::vector<Code>& functions_;
  std::vector<State> state_;
  std::vector<size_t> depth_;
  std::vector<uint32_t> reachable_;
  bool recursive_ = false;
  size_t private_bytes_ = 0;
};

} // namespace

LaunchState::LaunchState(const std::vector<Code>& functions, const std::vector<SharedVariable>& shared_variables, uint32_t kernel,
                         size_t dynamic_shared_bytes, uint64_t instruction_budget)
    : functions_(functions),
      kernel_(kernel),
      dynamic_shared_bytes_(dynamic_shared_bytes),
      instruction_budget_(instruction_budget),
      constants_(functions.size()) {
  const CallGraph calls(functions, kernel);
  private_bytes_ = calls.private_bytes();
  for (const uint32_t function : calls.reachable()) constants_[function] = functions[function].constants;
  place_shared_variables(shared_variables, calls.reachable());
}

void LaunchState::place_shared_variables(const std::vector<SharedVariable>& variables, const std::vector<uint32_t>& reachable) {
  std::vector<bool> used(variables.size());
  for (const uint32_t function : reachable)
    for (const Code::SharedSlot& slot : functions_[function].shared_slots) used[slot.shared_variable] = true;
  std::vector<uint64_t> addresses(variables.size());
  uint64_t dynamic_alignment = 16;
  const auto align = [this](uint64_t alignment) { static_shared_bytes_ = (static_shared_bytes_ + alignment - 1) / alignment * alignment; };
  for (size_t i = 0; i < variables.size(); ++i) {
    if (!used[i]) continue;
    if (variables[i].is_dynamic) {
      dynamic_alignment = std::max(dynamic_alignment, variables[i].alignment);
      continue;
    }
    align(variables[i].alignment);
    addresses[i] = static_shared_bytes_;
    static_shared_bytes_ += variables[i].bytes;
  }
  // All dynamic variables begin where the static ones end.
  if (dynamic_shared_bytes_ != 0) align(dynamic_alignment);
  for (size_t i = 0; i < variables.size(); ++i)
    if (variables[i].is_dynamic) addresses[i] = (static_shared_bytes_ + dynamic_alignment - 1) / dynamic_alignment * dynamic_alignment;
  for (const uint32_t function : reachable) {
    const Code& code = functions_[function];
    for (const Code::SharedSlot& slot : code.shared_slots)
      constants_[function][slot.slot - code.first_constant()] = addresses[slot.shared_variable] + static_cast<uint64_t>(slot.displacement);
  }
}

uint64_t LaunchState::special(const Thread& thread, Special special) const {
  const uint32_t lane = thread.lane;
  switch (special) {
    case Special::kTidX:
      return thread.thread_index.x;
    case Special::kTidY:
      return thread.thread_index.y;
    case Special::kTidZ:
      return thread.thread_index.z;
    case Special::kNtidX:
      return thread.block_dim.x;
    case Special::kNtidY:
      return thread.block_dim.y;
    case Special::kNtidZ:
      return thread.block_dim.z;
    case Special::kCtaidX:
      return thread.block_index.x;
    case Special::kCtaidY:
      return thread.block_index.y;
    case Special::kCtaidZ:
      return thread.block_index.z;
    case Special::kNctaidX:
      return thread.grid_dim.x;
    case Special::kNctaidY:
      return thread.grid_dim.y;
    case Special::kNctaidZ:
      return thread.grid_dim.z;
    case Special::kLaneId:
      return lane;
    case Special::kWarpId:
      return thread.warp;
    case Special::kNwarpId:
      return (thread.block_dim.count() + 31) / 32;
    case Special::kLanemaskEq:
      return 1u << lane;
    case Special::kLanemaskLt:
      return (1u << lane) - 1;
    case Special::kLanemaskLe:
      return (1u << lane) | ((1u << lane) - 1);
    case Special::kLanemaskGt:
      return ~((1u << lane) | ((1u << lane) - 1));
    case Special::kLanemaskGe:
      return ~((1u << lane) - 1);
    case Special::kOne:
      return 1;
    case Special::kTotalSharedBytes:
      return shared_bytes();
    case Special::kDynamicSharedBytes:
      return dynamic_shared_bytes_;
    case Special::kZero:
    case Special::kClock:
      break;
  }
  return 0;
}

std::byte* LaunchState::borrow_private_memory() const {
  if (free_private_memory_.empty()) {
    private_memory_.emplace_back(new std::byte[private_bytes_]);
    return private_memory_.back().get();
  }
  std::byte* const memory = free_private_memory_.back();
  free_private_memory_.pop_back();
  return memory;
}

void LaunchState::enter(PtxThread& thread, uint32_t function, const CallSite* site) const {
  const Code& code = functions_[function];
  std::byte* const begin = thread.frame == nullptr ? thread.private_begin : thread.frame->end();
  if (code.frame_bytes() > static_cast<size_t>(thread.private_end - begin))
    fail(FailureKind::kOutOfBounds, "the calls are nested deeper than the stack of a thread reaches", code.instructions.front().at);
  auto* const frame = reinterpret_cast<Frame*>(begin);
  *frame = {thread.frame, &code, site, thread.next};
  uint64_t* const slots = frame->slots();
  std::memset(slots, static_cast<int>(Frame::kGarbage), static_cast<size_t>(frame->end() - frame->bytes_of_slots()));
  slots[kTrue] = 1;
  const std::vector<uint64_t>& constants = constants_[function];
  if (!constants.empty()) std::memcpy(slots + code.first_constant(), constants.data(), constants.size() * sizeof constants[0]);
  for (const Code::SpecialSlot& slot : code.special_slots) slots[slot.slot] = special(*thread.thread, slot.special);
  for (const Code::VariableSlot& slot : code.variable_slots)
    slots[slot.slot] = reinterpret_cast<uint64_t>(frame->variables()) + slot.offset;
  if (site != nullptr)
    for (size_t n = 0; n < site->arguments.size(); ++n)
      std::memcpy(frame->variables() + code.parameters[n].offset, thread.frame->variables() + site->arguments[n].offset,
                  site->arguments[n].bytes);
  thread.frame = frame;
  thread.slots = slots;
  thread.instructions = code.instructions.data();
  thread.next = thread.instructions;
}

void LaunchState::leave(PtxThread& thread) {
  Frame& callee = *thread.frame;
  thread.next = callee.return_to;
  thread.frame = callee.caller;
  if (thread.frame == nullptr) return;
  for (size_t n = 0; n < callee.site->results.size(); ++n)
    std::memcpy(thread.frame->variables() + callee.site->results[n].offset, callee.variables() + callee.code->results[n].offset,
                callee.site->results[n].bytes);
  thread.slots = thread.frame->slots();
  thread.instructions = thread.frame->code->instructions.data();
}

void LaunchState::run_thread(void* const* arguments) const {
  PtxThread thread;
  thread.thread = &self();
  thread.shared = thread.thread->shared;
  thread.shared_bytes = thread.thread->shared_bytes;
  thread.private_begin = borrow_private_memory();
  thread.private_end = thread.private_begin + private_bytes_;
  thread.launch = this;
  enter(thread, kernel_, nullptr);
  for (size_t n = 0; n < kernel().parameters.size(); ++n)
    std::memcpy(thread.frame->variables() + kernel().parameters[n].offset, arguments[n], kernel().parameters[n].bytes);
  uint64_t& executed = thread.thread->instructions;
  while (thread.next != nullptr) {
    const Instruction& instruction = *thread.next++;
    // The scheduler checks the budget too, but only when it is told of something.
    if ((++executed & 0xffff) == 0 && executed > instruction_budget_) [[unlikely]]
      fail(FailureKind::kHang, "a thread executes more than " + std::to_string(instruction_budget_) + " instructions", instruction.at);
    if (thread.predicate(instruction.guard) == instruction.guard_negated) continue;
    instruction.execute(thread, instruction);
  }
  free_private_memory_.push_back(thread.private_begin);
}

} // namespace simt::ptx
