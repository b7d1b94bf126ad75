#include "interpreter.h"

#include <cstring>
#include <stdexcept>

#include "code_builder.h"
#include "launch_state.h"
#include "memory.h"
#include "module_reader.h"

namespace simt::ptx {

struct Program::State {
  Module module;
  std::vector<uint64_t> addresses; // of the module's variables; 0 for shared ones
  std::vector<SharedVariable> shared_variables;
  std::vector<Code> functions; // as in the module

  State() = default;
  State(const State&) = delete;
  State& operator=(const State&) = delete;
  ~State() {
    for (const uint64_t address : addresses)
      if (address != 0) release(reinterpret_cast<void*>(address));
  }

  void allocate_variables();
  void build_functions();
  const Variable& find_variable(const std::string& name) const;
  uint32_t add_shared(const Variable& variable);
};

void Program::State::allocate_variables() {
  for (const Variable& variable : module.variables) {
    const bool in_memory = variable.space == StateSpace::kGlobal || variable.space == StateSpace::kConst;
    addresses.push_back(in_memory ? reinterpret_cast<uint64_t>(allocate(std::max<size_t>(variable.bytes, 1), true)) : 0);
    if (!in_memory) continue;
    auto* const bytes = reinterpret_cast<uint8_t*>(addresses.back());
    std::memset(bytes, 0, variable.bytes);
    if (!variable.initial.empty()) std::memcpy(bytes, variable.initial.data(), variable.bytes);
  }
  for (size_t i = 0; i < module.variables.size(); ++i)
    for (const AddressInInitial& word : module.variables[i].addresses) {
      const auto target = static_cast<size_t>(&find_variable(word.symbol) - module.variables.data());
      const uint64_t address = addresses[target] + static_cast<uint64_t>(word.displacement);
      std::memcpy(reinterpret_cast<void*>(addresses[i] + word.offset), &address, sizeof address);
    }
}

uint32_t Program::State::add_shared(const Variable& variable) {
  if (variable.space != StateSpace::kShared && variable.space != StateSpace::kDynamicShared) return 0;
  shared_variables.push_back({variable.bytes, variable.alignment, variable.space == StateSpace::kDynamicShared});
  return static_cast<uint32_t>(shared_variables.size() - 1);
}

void Program::State::build_functions() {
  Surroundings surroundings{module, addresses, {}};
  for (const Variable& variable : module.variables) surroundings.module_shared_variables.push_back(add_shared(variable));
  uint32_t first_pc = 0;
  for (const Function& function : module.functions) {
    std::vector<uint32_t> shared;
    for (const Variable& variable : function.variables) shared.push_back(add_shared(variable));
    functions.push_back(CodeBuilder(surroundings, function, std::move(shared), first_pc).build());
    first_pc += static_cast<uint32_t>(functions.back().instructions.size());
  }
}

const Variable& Program::State::find_variable(const std::string& name) const {
  for (const Variable& variable : module.variables)
    if (variable.name == name && (variable.space == StateSpace::kGlobal || variable.space == StateSpace::kConst)) return variable;
  throw std::out_of_range(module.name + " has no global variable " + name);
}

Program::Program(std::unique_ptr<State> state) : state_(std::move(state)) {}
Program::Program(Program&&) noexcept = default;
Program& Program::operator=(Program&&) noexcept = default;
Program::~Program() = default;

Program Program::from_ptx(const std::string& text, const std::string& name) {
  auto state = std::make_unique<State>();
  state->module = read_module(text, name);
  state->allocate_variables();
  state->build_functions();
  return Program(std::move(state));
}

bool Program::has_kernel(const std::string& kernel) const {
  const Function* function = state_->module.function(kernel);
  return function != nullptr && function->is_kernel && function->is_defined;
}

std::vector<std::string> Program::kernels() const {
  std::vector<std::string> names;
  for (const Function& function : state_->module.functions)
    if (function.is_kernel && function.is_defined) names.push_back(function.name);
  return names;
}

uint32_t Program::kernel_index(const std::string& kernel) const {
  if (!has_kernel(kernel)) throw std::invalid_argument(state_->module.name + " has no kernel " + kernel);
  return static_cast<uint32_t>(state_->module.function(kernel) - state_->module.functions.data());
}

std::vector<size_t> Program::parameter_bytes(const std::string& kernel) const {
  std::vector<size_t> bytes;
  for (const FrameRange& parameter : state_->functions[kernel_index(kernel)].parameters) bytes.push_back(parameter.bytes);
  return bytes;
}

void* Program::variable(const std::string& name) const {
  const auto index = static_cast<size_t>(&state_->find_variable(name) - state_->module.variables.data());
  return reinterpret_cast<void*>(state_->addresses[index]);
}

size_t Program::variable_bytes(const std::string& name) const { return state_->find_variable(name).bytes; }

void Program::launch(const std::string& kernel, Dim3 grid, Dim3 block, size_t dynamic_shared_bytes, void* const* arguments,
                     const LaunchOptions& options) const {
  const uint32_t index = kernel_index(kernel);
  const Code& code = state_->functions[index];
  if (code.max_threads != 0 && block.count() > code.max_threads)
    throw std::invalid_argument(kernel + " was compiled for blocks of at most " + std::to_string(code.max_threads) + " threads, got " +
                                std::to_string(block.count()));
  const LaunchState launch_state(state_->functions, state_->shared_variables, index, dynamic_shared_bytes, options.instruction_budget);
  simt::launch(code.name.c_str(), grid, block, launch_state.shared_bytes(), [&] { launch_state.run_thread(arguments); }, options);
}

} // namespace simt::ptx
