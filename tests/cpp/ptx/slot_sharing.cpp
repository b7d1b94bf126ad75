#include "slot_sharing.h"

#include <algorithm>
#include <bit>
#include <queue>
#include <utility>

namespace simt::ptx {
namespace {

class Bits {
 public:
  Bits() = default;
  explicit Bits(size_t size) : words_((size + 63) / 64) {}
  bool operator[](size_t n) const { return (words_[n / 64] >> n % 64 & 1) != 0; }
  void set(size_t n) { words_[n / 64] |= uint64_t{1} << n % 64; }
  // Adds what `other` has and `without` has not; returns whether that was anything new.
  bool add(const Bits& other, const Bits& without) {
    uint64_t added = 0;
    for (size_t w = 0; w < words_.size(); ++w) {
      const uint64_t before = std::exchange(words_[w], words_[w] | (other.words_[w] & ~without.words_[w]));
      added |= words_[w] ^ before;
    }
    return added != 0;
  }
  template <typename Visit>
  void for_each(Visit visit) const {
    for (size_t w = 0; w < words_.size(); ++w)
      for (uint64_t left = words_[w]; left != 0; left &= left - 1) visit(w * 64 + static_cast<size_t>(std::countr_zero(left)));
  }

 private:
  std::vector<uint64_t> words_;
};

// Instructions that are executed one after the other: only the first is jumped to, only the last jumps.
struct Block {
  uint32_t begin = 0, end = 0;
  std::vector<uint32_t> next;       // blocks that may follow
  Bits reads, writes;               // before anything else is done to the register
  Bits needed_before, needed_after; // values that a later read may get
};

// The instructions during which a register's slot cannot be another's.
struct Lifetime {
  uint32_t first = ~uint32_t{0}, last = 0;
  void include(uint32_t at) {
    first = std::min(first, at);
    last = std::max(last, at);
  }
};

class SlotSharing {
 public:
  SlotSharing(Code& code, const Function& function)
      : code_(code), function_(function), registers_end_(code.first_constant()), lifetimes_(registers_end_), global_(registers_end_) {}

  void run() {
    find_blocks();
    find_globals();
    find_needed();
    find_lifetimes();
    renumber(shared_slots());
  }

 private:
  static constexpr uint32_t kLocal = ~uint32_t{0};

  bool is_register(Slot slot) const { return slot > kTrue && slot < registers_end_; }
  template <typename Visit>
  void for_each_read(const Instruction& i, Visit visit) const {
    for (const Slot slot : i.from)
      if (is_register(slot)) visit(slot);
    if (is_register(i.guard)) visit(i.guard);
  }
  template <typename Visit>
  void for_each_write(const Instruction& i, Visit visit) const {
    for (const Slot slot : i.to)
      if (is_register(slot)) visit(slot);
  }

  std::vector<uint32_t> jumps(uint32_t at) const;
  bool goes_on(uint32_t at) const;
  void find_blocks();
  void find_globals();
  void find_needed();
  void find_lifetimes();
  std::vector<Slot> shared_slots() const;
  void renumber(const std::vector<Slot>& new_slots);

  Code& code_;
  const Function& function_;
  const Slot registers_end_;
  std::vector<Block> blocks_;
  std::vector<Lifetime> lifetimes_; // by slot
  std::vector<uint32_t> global_;    // by slot: number among the registers that a block may read before it writes them, or kLocal
  std::vector<Slot> globals_;
};

std::vector<uint32_t> SlotSharing::jumps(uint32_t at) const {
  if (at == function_.instructions.size()) return {}; // the final ret
  const std::string& opcode = function_.instructions[at].opcode;
  if (opcode == "bra") return {code_.instructions[at].target};
  if (opcode == "brx") return code_.tables[code_.instructions[at].target];
  return {};
}

bool SlotSharing::goes_on(uint32_t at) const {
  if (at == function_.instructions.size()) return false;
  const std::string& opcode = function_.instructions[at].opcode;
  return function_.instructions[at].guard || (opcode != "bra" && opcode != "brx" && opcode != "ret" && opcode != "exit");
}

void SlotSharing::find_blocks() {
  const auto size = static_cast<uint32_t>(code_.instructions.size());
  std::vector<bool> begins(size + 1);
  begins[0] = begins[size] = true;
  for (uint32_t at = 0; at < size; ++at) {
    const std::vector<uint32_t> targets = jumps(at);
    for (const uint32_t target : targets) begins[target] = true;
    if (!targets.empty() || !goes_on(at)) begins[at + 1] = true;
  }
  std::vector<uint32_t> block_at(size);
  for (uint32_t at = 0; at < size; ++at) {
    if (begins[at]) blocks_.emplace_back().begin = at;
    block_at[at] = static_cast<uint32_t>(blocks_.size() - 1);
    blocks_.back().end = at + 1;
  }
  for (Block& block : blocks_) {
    for (const uint32_t target : jumps(block.end - 1)) block.next.push_back(block_at[target]);
    if (goes_on(block.end - 1)) block.next.push_back(block_at[block.end]);
  }
}

// Most registers live within one block; only the others take part in what follows.
void SlotSharing::find_globals() {
  std::fill(global_.begin(), global_.end(), kLocal);
  std::vector<const Block*> written_in(registers_end_);
  for (const Block& block : blocks_)
    for (uint32_t at = block.begin; at < block.end; ++at) {
      const Instruction& i = code_.instructions[at];
      for_each_read(i, [&](Slot slot) {
        if (written_in[slot] == &block || global_[slot] != kLocal) return;
        global_[slot] = static_cast<uint32_t>(globals_.size());
        globals_.push_back(slot);
      });
      if (i.guard == kTrue) for_each_write(i, [&](Slot slot) { written_in[slot] = &block; });
    }
}

void SlotSharing::find_needed() {
  for (Block& block : blocks_) {
    block.reads = block.writes = block.needed_after = Bits(globals_.size());
    for (uint32_t at = block.begin; at < block.end; ++at) {
      const Instruction& i = code_.instructions[at];
      for_each_read(i, [&](Slot slot) {
        if (const uint32_t n = global_[slot]; n != kLocal && !block.writes[n]) block.reads.set(n);
      });
      if (i.guard != kTrue) continue; // then the old value may stay
      for_each_write(i, [&](Slot slot) {
        if (const uint32_t n = global_[slot]; n != kLocal && !block.reads[n]) block.writes.set(n);
      });
    }
    block.needed_before = block.reads;
  }
  const Bits none(globals_.size());
  for (bool changed = true; changed;) {
    changed = false;
    for (auto block = blocks_.rbegin(); block != blocks_.rend(); ++block) {
      for (const uint32_t next : block->next) block->needed_after.add(blocks_[next].needed_before, none);
      changed |= block->needed_before.add(block->needed_after, block->writes);
    }
  }
}

void SlotSharing::find_lifetimes() {
  for (uint32_t at = 0; at < code_.instructions.size(); ++at) {
    const auto include = [&](Slot slot) { lifetimes_[slot].include(at); };
    for_each_read(code_.instructions[at], include);
    for_each_write(code_.instructions[at], include);
  }
  for (const Block& block : blocks_) {
    block.needed_before.for_each([&](size_t n) { lifetimes_[globals_[n]].include(block.begin); });
    block.needed_after.for_each([&](size_t n) { lifetimes_[globals_[n]].include(block.end - 1); });
  }
}

std::vector<Slot> SlotSharing::shared_slots() const {
  std::vector<Slot> new_slots(registers_end_, kSink), in_order;
  Slot end = kTrue + 1, slot = kTrue + 1;
  for (const Register& reg : function_.registers) {
    if (reg.type == Type::kB128) { // takes two slots, which are never shared
      new_slots[slot] = std::exchange(end, end + 2);
      slot += 2;
      continue;
    }
    if (lifetimes_[slot].first <= lifetimes_[slot].last) in_order.push_back(slot);
    ++slot;
  }
  std::sort(in_order.begin(), in_order.end(), [&](Slot a, Slot b) { return lifetimes_[a].first < lifetimes_[b].first; });
  const auto ends_later = [&](Slot a, Slot b) { return lifetimes_[a].last > lifetimes_[b].last; };
  std::priority_queue<Slot, std::vector<Slot>, decltype(ends_later)> in_use(ends_later);
  std::vector<Slot> free; // the last one first, as it is the most likely to be in the cache
  for (const Slot wanted : in_order) {
    for (; !in_use.empty() && lifetimes_[in_use.top()].last < lifetimes_[wanted].first; in_use.pop())
      free.push_back(new_slots[in_use.top()]);
    if (free.empty()) free.push_back(end++);
    new_slots[wanted] = free.back();
    free.pop_back();
    in_use.push(wanted);
  }
  new_slots.push_back(end); // where the constants begin
  return new_slots;
}

void SlotSharing::renumber(const std::vector<Slot>& new_slots) {
  const auto renumber = [&](Slot& slot) {
    if (slot >= registers_end_)
      slot += new_slots[registers_end_] - registers_end_;
    else if (slot > kTrue)
      slot = new_slots[slot];
  };
  for (Instruction& i : code_.instructions) {
    for (Slot& slot : i.to) renumber(slot);
    for (Slot& slot : i.from) renumber(slot);
    renumber(i.guard);
  }
  for (Code::SpecialSlot& special : code_.special_slots) renumber(special.slot);
  for (Code::VariableSlot& variable : code_.variable_slots) renumber(variable.slot);
  for (Code::SharedSlot& shared : code_.shared_slots) renumber(shared.slot);
  renumber(code_.slots);
}

} // namespace

void share_slots(Code& code, const Function& function) { SlotSharing(code, function).run(); }

} // namespace simt::ptx
