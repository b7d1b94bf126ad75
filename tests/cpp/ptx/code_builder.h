// Makes the Code of one function: gives slots to what its instructions name.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "code.h"
#include "module.h"

namespace simt::ptx {

// What a function needs to know of the module around it.
struct Surroundings {
  const Module& module;
  const std::vector<uint64_t>& variable_addresses; // of the module's variables in the spaces global and const
  std::vector<uint32_t> module_shared_variables;   // number of the module's shared variables in the program's list
};

class CodeBuilder {
 public:
  // `shared_variables`: number of this function's shared variables in the program's list, by variable. `first_pc`: unique numbers.
  CodeBuilder(const Surroundings& surroundings, const Function& function, std::vector<uint32_t> shared_variables, uint32_t first_pc);

  Code build();

  Slot slot_of_constant(uint64_t value);
  Slot slot_of_register(uint32_t index) const { return register_slots_[index]; }
  Slot slot_of_special(Special special);
  Slot slot_of_variable(VariableId id, int64_t displacement);
  FrameRange range_of_variable(VariableId id) const; // of a parameter or local variable
  const Variable& variable(VariableId id) const;
  const Function& function() const { return function_; }
  const Module& module() const { return surroundings_.module; }
  uint32_t add_call(CallSite site);
  std::optional<uint32_t> function_index(const std::string& name) const;

 private:
  Slot next_constant();
  Location location_of(const ParsedInstruction& parsed, uint32_t index) const;
  void place_variables();
  void number_registers();

  const Surroundings& surroundings_;
  const Function& function_;
  std::vector<uint32_t> shared_variables_;
  uint32_t first_pc_;
  Code code_;
  std::vector<Slot> register_slots_;
  std::vector<uint64_t> variable_offsets_;
  std::map<uint64_t, Slot> constants_;
  std::map<Special, Slot> specials_;
  std::map<std::tuple<bool, uint32_t, int64_t>, Slot> variables_;
};

} // namespace simt::ptx
