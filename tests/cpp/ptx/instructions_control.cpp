// Moves, branches, calls, barriers, fences and the end of a thread.
#include <cstring>

#include "code_builder.h"
#include "decoder.h"
#include "launch_state.h"

namespace simt::ptx {
namespace {

void execute_nothing(PtxThread&, const Instruction&) {}

// ---- mov

void execute_move(PtxThread& thread, const Instruction& i) { thread.slots[i.to[0]] = thread.slots[i.from[0]]; }
void execute_move_predicate(PtxThread& thread, const Instruction& i) { thread.write(i.to[0], thread.predicate(i.from[0])); }
void execute_move_128(PtxThread& thread, const Instruction& i) {
  if (i.to[0] != kSink) std::memcpy(&thread.slots[i.to[0]], &thread.slots[i.from[0]], 16);
}
// The scheduler's own time: it passes with every instruction, as a clock should.
void execute_read_clock(PtxThread& thread, const Instruction& i) { thread.write(i.to[0], thread.thread->instructions); }

// count: elements of the vector
template <typename Element, typename Whole>
void execute_join(PtxThread& thread, const Instruction& i) {
  Whole whole = 0;
  for (int n = 0; n < i.count; ++n)
    whole |= static_cast<Whole>(static_cast<Whole>(thread.read<Element>(i.from[n])) << 8 * sizeof(Element) * n);
  thread.write(i.to[0], whole);
}
template <typename Element>
void execute_split(PtxThread& thread, const Instruction& i) {
  const uint64_t whole = thread.slots[i.from[0]];
  for (int n = 0; n < i.count; ++n) thread.write(i.to[n], static_cast<Element>(whole >> 8 * sizeof(Element) * n));
}
void execute_join_128(PtxThread& thread, const Instruction& i) {
  const uint64_t both[] = {thread.slots[i.from[0]], thread.slots[i.from[1]]};
  if (i.to[0] != kSink) std::memcpy(&thread.slots[i.to[0]], both, sizeof both);
}
void execute_split_128(PtxThread& thread, const Instruction& i) {
  const uint64_t both[] = {thread.slots[i.from[0]], thread.slots[i.from[0] + 1]};
  thread.write(i.to[0], both[0]);
  thread.write(i.to[1], both[1]);
}

Type element_type(Decoder& d, size_t bytes) {
  switch (bytes) {
    case 1:
      return Type::kB8;
    case 2:
      return Type::kB16;
    case 4:
      return Type::kB32;
    case 8:
      return Type::kB64;
    default:
      d.fail("a vector whose elements are of no known size");
  }
}

Execute decode_vector_move(Decoder& d, Type type) {
  const bool joins = d.peek_operand().kind != OperandKind::kVector;
  const Operand& vector = d.parsed().operands[joins ? 1 : 0];
  const size_t count = vector.elements.size(), bytes = bytes_of(type) / std::max<size_t>(count, 1);
  if (count != 2 && count != 4) return nullptr;
  const Type element = element_type(d, bytes);
  d.result.count = static_cast<uint8_t>(count);
  if (joins) {
    d.destination(type);
    d.vector_source(element, count);
    if (type == Type::kB128) return count == 2 ? execute_join_128 : nullptr;
    if (type == Type::kB64) return count == 2 ? execute_join<uint32_t, uint64_t> : execute_join<uint16_t, uint64_t>;
    if (type == Type::kB32) return count == 2 ? execute_join<uint16_t, uint32_t> : execute_join<uint8_t, uint32_t>;
    return type == Type::kB16 && count == 2 ? execute_join<uint8_t, uint32_t> : Execute{nullptr};
  }
  d.vector_destination(element, count);
  d.source(type);
  if (type == Type::kB128) return count == 2 ? execute_split_128 : nullptr;
  return with_integer(element, [](auto zero) -> Execute { return execute_split<decltype(zero)>; });
}

Execute decode_move(Decoder& d) {
  const Type type = d.take_type({Type::kPredicate, Type::kB16, Type::kB32, Type::kB64, Type::kB128, Type::kU16, Type::kU32, Type::kU64,
                                 Type::kS16, Type::kS32, Type::kS64, Type::kF32, Type::kF64});
  if (d.operands_left() != 2) d.fail("expected two operands");
  const Operand& from = d.parsed().operands[1];
  if (d.peek_operand().kind == OperandKind::kVector || from.kind == OperandKind::kVector) return decode_vector_move(d, type);
  if (from.kind == OperandKind::kSpecial && (from.name == "%clock" || from.name == "%clock64" || from.name == "%globaltimer")) {
    d.destination(type);
    d.take_operand();
    return execute_read_clock;
  }
  d.operands(type, 1);
  if (type == Type::kPredicate) return execute_move_predicate;
  return type == Type::kB128 ? execute_move_128 : execute_move;
}

// ---- branches

void execute_branch(PtxThread& thread, const Instruction& i) { thread.next = thread.instructions + i.target; }

Execute decode_branch(Decoder& d) {
  d.take("uni");
  const Operand& label = d.take_operand();
  if (label.kind != OperandKind::kLabel) return nullptr;
  d.result.target = d.builder().function().labels[label.index];
  return execute_branch;
}

void execute_indexed_branch(PtxThread& thread, const Instruction& i) {
  const auto& table = thread.frame->code->tables[i.target];
  const auto index = thread.read<uint32_t>(i.from[0]);
  if (index >= table.size())
    fail(FailureKind::kOutOfBounds, "brx.idx with index " + std::to_string(index) + " of " + std::to_string(table.size()), i.at);
  thread.next = thread.instructions + table[index];
}

Execute decode_indexed_branch(Decoder& d) {
  d.require("idx");
  d.take("uni");
  d.source(Type::kU32);
  const Operand& table = d.take_operand();
  if (table.kind != OperandKind::kTargets) return nullptr;
  d.result.target = table.index;
  return execute_indexed_branch;
}

// ---- calls

void execute_call(PtxThread& thread, const Instruction& i) {
  const CallSite& site = thread.frame->code->calls[i.target];
  thread.launch->enter(thread, site.callee, &site);
}

void execute_return(PtxThread& thread, const Instruction&) { LaunchState::leave(thread); }
void execute_exit(PtxThread& thread, const Instruction&) { thread.next = nullptr; }

template <typename T>
T argument(const PtxThread& thread, const CallSite& site, size_t n) {
  T value{};
  if (n < site.arguments.size() && site.arguments[n].bytes == sizeof value)
    std::memcpy(&value, thread.frame->variables() + site.arguments[n].offset, sizeof value);
  return value;
}

// void __assertfail(message, file, line, function, size of a character)
void execute_assert_fail(PtxThread& thread, const Instruction& i) {
  const CallSite& site = thread.frame->code->calls[i.target];
  const auto text = [&](size_t n) {
    const char* characters = argument<const char*>(thread, site, n);
    return characters == nullptr ? std::string("?") : std::string(characters);
  };
  const auto line = argument<uint32_t>(thread, site, 2);
  fail(FailureKind::kTrap, "assertion failed: " + text(0) + ", " + text(1) + ":" + std::to_string(line) + ", " + text(3), i.at);
}

// Device printf prints nothing here and reports that.
void execute_print(PtxThread& thread, const Instruction& i) {
  for (const FrameRange& result : thread.frame->code->calls[i.target].results)
    std::memset(thread.frame->variables() + result.offset, 0, result.bytes);
}

std::vector<FrameRange> ranges_of(Decoder& d, const Operand& list) {
  std::vector<FrameRange> ranges;
  for (const Operand& operand : list.elements) {
    if (operand.kind != OperandKind::kVariable || operand.variable.of_module ||
        d.builder().variable(operand.variable).space != StateSpace::kParam)
      d.fail("an argument that is not in .param");
    ranges.push_back(d.builder().range_of_variable(operand.variable));
  }
  return ranges;
}

void check_signature(Decoder& d, const std::vector<FrameRange>& given, const std::vector<uint32_t>& expected, const Function& callee) {
  bool same = given.size() == expected.size();
  for (size_t n = 0; same && n < given.size(); ++n) same = given[n].bytes == callee.variables[expected[n]].bytes;
  if (!same) d.fail("arguments or results that differ from the declaration of " + callee.name);
}

Execute decode_call(Decoder& d) {
  d.take("uni");
  CallSite site;
  if (d.peek_operand().kind == OperandKind::kList) site.results = ranges_of(d, d.take_operand());
  const Operand& callee = d.take_operand();
  if (callee.kind != OperandKind::kFunction) d.fail("a call of something that is no function known by name");
  if (d.operands_left() != 0 && d.peek_operand().kind == OperandKind::kList) site.arguments = ranges_of(d, d.take_operand());
  const auto index = d.builder().function_index(callee.name);
  if (!index) d.fail("unknown function " + callee.name);
  const Function& function = d.builder().module().functions[*index];
  check_signature(d, site.arguments, function.parameters, function);
  check_signature(d, site.results, function.results, function);
  if (function.is_defined) {
    site.callee = *index;
    d.result.target = d.builder().add_call(std::move(site));
    return execute_call;
  }
  d.result.target = d.builder().add_call(std::move(site));
  if (callee.name == "vprintf") return execute_print;
  if (callee.name == "__assertfail") return execute_assert_fail;
  d.fail("function " + callee.name + " is only declared");
}

Execute decode_return(Decoder& d) {
  d.take("uni");
  return execute_return;
}
Execute decode_exit(Decoder&) { return execute_exit; }

void execute_trap(PtxThread&, const Instruction& i) { fail(FailureKind::kTrap, "trap", i.at); }
Execute decode_trap(Decoder&) { return execute_trap; }

// ---- barriers

uint32_t barrier_number(const PtxThread& thread, const Instruction& i) {
  const auto number = thread.read<uint32_t>(i.from[0]);
  if (number > 15) fail(FailureKind::kBarrier, "barrier " + std::to_string(number) + ", but a block has 16", i.at);
  return number;
}

// from: barrier, count
void execute_barrier(PtxThread& thread, const Instruction& i) {
  barrier(barrier_number(thread, i), thread.read<uint32_t>(i.from[1]), i.at);
}

enum Reduction : size_t { kPopulation, kAll, kAny };

template <Reduction reduction>
void execute_barrier_reduction(PtxThread& thread, const Instruction& i) { // from: barrier, count, predicate
  const auto count = thread.read<uint32_t>(i.from[1]);
  const bool vote = thread.predicate(i.from[2]) != i.negated_predicate;
  const uint32_t passed = barrier_reduce(barrier_number(thread, i), count, vote, i.at);
  const uint64_t participants = count != 0 ? count : thread.thread->block_dim.count();
  if constexpr (reduction == kPopulation)
    thread.write(i.to[0], passed);
  else
    thread.write(i.to[0], reduction == kAll ? passed == participants : passed != 0);
}

void execute_warp_barrier(PtxThread& thread, const Instruction& i) {
  collective(Collective::kSyncWarp, thread.read<uint32_t>(i.from[0]), 0, 0, i.at);
}

// The barrier's number and, where it stands, how many threads take part: 0 for all.
void take_barrier_operands(Decoder& d, bool has_count) {
  d.source(Type::kU32);
  if (has_count)
    d.source(Type::kU32);
  else
    d.add_source(d.slot_of_number(0));
}

Execute decode_barrier(Decoder& d) {
  d.take("cta");
  d.take("aligned");
  if (d.take("warp")) {
    if (d.opcode() != "bar") return nullptr;
    d.require("sync");
    d.source(Type::kB32);
    return execute_warp_barrier;
  }
  if (d.take("sync")) {
    take_barrier_operands(d, d.operands_left() == 2);
    return execute_barrier;
  }
  d.require("red");
  const size_t reduction = d.require_one_of({"popc", "and", "or"});
  const Type type = d.take_type({Type::kU32, Type::kPredicate});
  if ((type == Type::kU32) != (reduction == kPopulation)) return nullptr;
  d.destination(type);
  take_barrier_operands(d, d.operands_left() == 3);
  d.predicate_source();
  return reduction == kPopulation ? execute_barrier_reduction<kPopulation>
         : reduction == kAll      ? execute_barrier_reduction<kAll>
                                  : execute_barrier_reduction<kAny>;
}

// ---- fences

void execute_fence(PtxThread&, const Instruction& i) { fence(i.mode != 0, i.at); }

Execute decode_fence(Decoder& d) {
  if (d.take("proxy")) { // orders other paths to memory, of which there are none here
    d.require_one_of({"alias", "async", "async::generic", "async.global"});
    d.take_one_of({"global", "shared::cta", "shared::cluster"});
    return execute_nothing;
  }
  if (d.opcode() == "membar") {
    d.result.mode = d.require_one_of({"cta", "gl", "sys"}) == 0;
    return execute_fence;
  }
  d.take_one_of({"sc", "acq_rel"});
  d.result.mode = d.require_one_of({"cta", "cluster", "gpu", "sys"}) <= 1; // a cluster is one block here
  return execute_fence;
}

// ---- waiting

void execute_sleep(PtxThread&, const Instruction& i) { yield(i.at); }

Execute decode_sleep(Decoder& d) {
  d.require("u32");
  d.source(Type::kU32);
  return execute_sleep;
}

Execute decode_grid_dependency(Decoder& d) { // launches run one after the other
  d.require_one_of({"launch_dependents", "wait"});
  return execute_nothing;
}

constexpr Opcode kOpcodes[] = {
    {"mov", decode_move},           {"bra", decode_branch},
    {"brx", decode_indexed_branch}, {"call", decode_call},
    {"ret", decode_return},         {"exit", decode_exit},
    {"trap", decode_trap},          {"brkpt", decode_trap},
    {"bar", decode_barrier},        {"barrier", decode_barrier},
    {"fence", decode_fence},        {"membar", decode_fence},
    {"nanosleep", decode_sleep},    {"griddepcontrol", decode_grid_dependency},
};

} // namespace

std::span<const Opcode> control_opcodes() { return kOpcodes; }

} // namespace simt::ptx
