#include "code_builder.h"

#include <array>
#include <unordered_map>

#include "decoder.h"
#include "slot_sharing.h"

namespace simt::ptx {
namespace {

const std::unordered_map<std::string_view, Decode>& opcodes() {
  static const auto table = [] {
    std::unordered_map<std::string_view, Decode> all;
    for (const auto group : {integer_opcodes(), bit_opcodes(), float_opcodes(), convert_opcodes(), compare_opcodes(), memory_opcodes(),
                             atomic_opcodes(), control_opcodes(), warp_opcodes()})
      for (const Opcode& opcode : group)
        if (!all.emplace(opcode.name, opcode.decode).second) throw std::logic_error("two files decode " + std::string(opcode.name));
    return all;
  }();
  return table;
}

uint64_t round_up(uint64_t value, uint64_t alignment) { return (value + alignment - 1) / alignment * alignment; }

} // namespace

CodeBuilder::CodeBuilder(const Surroundings& surroundings, const Function& function, std::vector<uint32_t> shared_variables,
                         uint32_t first_pc)
    : surroundings_(surroundings), function_(function), shared_variables_(std::move(shared_variables)), first_pc_(first_pc) {}

Code CodeBuilder::build() {
  code_.name = function_.name;
  code_.is_kernel = function_.is_kernel;
  code_.is_defined = function_.is_defined;
  code_.max_threads = function_.max_threads;
  place_variables();
  number_registers();
  for (const ParsedInstruction& parsed : function_.instructions) {
    Decoder decoder(parsed, *this);
    const auto opcode = opcodes().find(parsed.opcode);
    if (opcode == opcodes().end()) decoder.fail("unknown instruction " + parsed.opcode);
    const Execute execute = opcode->second(decoder);
    if (execute == nullptr) decoder.fail("a combination of modifiers that is not known");
    decoder.finish();
    Instruction instruction = decoder.result;
    instruction.execute = execute;
    if (parsed.guard) {
      instruction.guard = slot_of_register(parsed.guard->index);
      instruction.guard_negated = parsed.guard->negated;
    }
    instruction.at = location_of(parsed, static_cast<uint32_t>(code_.instructions.size()));
    code_.instructions.push_back(instruction);
  }
  // The end of a body returns, also when a label stands there.
  ParsedInstruction end;
  end.opcode = "ret";
  if (!function_.instructions.empty()) end.source_line = function_.instructions.back().source_line;
  Decoder decoder(end, *this);
  Instruction instruction;
  instruction.execute = opcodes().at("ret")(decoder);
  instruction.at = location_of(end, static_cast<uint32_t>(code_.instructions.size()));
  code_.instructions.push_back(instruction);
  for (const auto& table : function_.tables) {
    code_.tables.emplace_back();
    for (const uint32_t label : table) code_.tables.back().push_back(function_.labels[label]);
  }
  share_slots(code_, function_);
  return std::move(code_);
}

void CodeBuilder::place_variables() {
  for (const Variable& variable : function_.variables) {
    const bool in_frame = variable.space == StateSpace::kLocal || variable.space == StateSpace::kParam;
    const uint64_t offset = in_frame ? round_up(code_.variables_bytes, variable.alignment) : 0;
    variable_offsets_.push_back(offset);
    if (in_frame) code_.variables_bytes = offset + variable.bytes;
  }
  for (const uint32_t parameter : function_.parameters) code_.parameters.push_back(range_of_variable({false, parameter}));
  for (const uint32_t result : function_.results) code_.results.push_back(range_of_variable({false, result}));
}

void CodeBuilder::number_registers() {
  code_.slots = kTrue + 1;
  for (const Register& reg : function_.registers) {
    register_slots_.push_back(code_.slots);
    code_.slots += reg.type == Type::kB128 ? 2 : 1;
  }
}

Slot CodeBuilder::next_constant() {
  code_.constants.push_back(0);
  return code_.slots++;
}

Slot CodeBuilder::slot_of_constant(uint64_t value) {
  const auto [found, is_new] = constants_.try_emplace(value, 0);
  if (is_new) {
    found->second = next_constant();
    code_.constants.back() = value;
  }
  return found->second;
}

Slot CodeBuilder::slot_of_special(Special special) {
  const auto [found, is_new] = specials_.try_emplace(special, 0);
  if (is_new) {
    found->second = next_constant();
    code_.special_slots.push_back({found->second, special});
  }
  return found->second;
}

const Variable& CodeBuilder::variable(VariableId id) const {
  return id.of_module ? surroundings_.module.variables[id.index] : function_.variables[id.index];
}

FrameRange CodeBuilder::range_of_variable(VariableId id) const { return {variable_offsets_[id.index], variable(id).bytes}; }

Slot CodeBuilder::slot_of_variable(VariableId id, int64_t displacement) {
  const auto [found, is_new] = variables_.try_emplace({id.of_module, id.index, displacement}, 0);
  if (!is_new) return found->second;
  found->second = next_constant();
  const StateSpace space = variable(id).space;
  if (space == StateSpace::kShared || space == StateSpace::kDynamicShared) {
    const uint32_t shared = id.of_module ? surroundings_.module_shared_variables[id.index] : shared_variables_[id.index];
    code_.shared_slots.push_back({found->second, shared, displacement});
  } else if (id.of_module) {
    code_.constants.back() = surroundings_.variable_addresses[id.index] + static_cast<uint64_t>(displacement);
  } else {
    code_.variable_slots.push_back({found->second, variable_offsets_[id.index] + static_cast<uint64_t>(displacement)});
  }
  return found->second;
}

uint32_t CodeBuilder::add_call(CallSite site) {
  code_.calls.push_back(std::move(site));
  return static_cast<uint32_t>(code_.calls.size() - 1);
}

std::optional<uint32_t> CodeBuilder::function_index(const std::string& name) const {
  const Function* found = surroundings_.module.function(name);
  if (found == nullptr) return std::nullopt;
  return static_cast<uint32_t>(found - surroundings_.module.functions.data());
}

Location CodeBuilder::location_of(const ParsedInstruction& parsed, uint32_t index) const {
  Location at;
  at.pc = first_pc_ + index;
  at.line = parsed.source_line;
  const auto& files = surroundings_.module.files;
  if (parsed.source_file < files.size() && !files[parsed.source_file].empty())
    at.file = files[parsed.source_file].c_str();
  else
    at = {surroundings_.module.name.c_str(), parsed.ptx_line, at.pc}; // without .loc the line of the PTX text is the best there is
  return at;
}

} // namespace simt::ptx
