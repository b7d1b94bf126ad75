// Reads the body of one function: registers, variables, labels and instructions, in scopes that may nest.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "cursor.h"
#include "module.h"

namespace simt::ptx {

class FunctionReader {
 public:
  // `module` holds what was declared before; `function` has its name and parameters already.
  FunctionReader(Cursor& cursor, const Module& module, Function& function);

  void read(); // from { to its }

 private:
  // "%r<10>" declares %r0 to %r9; "%x" one register.
  struct RegisterRange {
    uint32_t first = 0, count = 0;
    bool numbered = false;
  };
  // A name that may be a label behind it: known when the scope ends.
  struct Reference {
    std::string name;
    const Token* at;
    bool in_table;
    uint32_t outer, inner; // of the instruction and its operand, or of the table and its entry
  };
  struct Scope {
    std::map<std::string, RegisterRange> registers;
    std::map<std::string, uint32_t> variables;
    std::map<std::string, uint32_t> labels, tables;
    std::vector<Reference> references;
  };

  void read_statement();
  void read_registers();
  void read_location();
  void read_label();
  void read_table(const std::string& name);
  void read_function_variables();
  void read_instruction();
  Operand read_operand();
  Operand read_single_operand();
  Operand read_address();
  Operand read_word();
  std::vector<Operand> read_list_until(const char* close);

  void declare_variable(const Variable& variable);
  std::optional<uint32_t> register_named(const std::string& name) const;
  std::optional<VariableId> variable_named(const std::string& name) const;
  int64_t read_displacement();
  void close_scope(); // binds the references to its labels and hands the others to the scope around it
  bool bind(const Scope& scope, const Reference& reference);

  Cursor& cursor_;
  const Module& module_;
  Function& function_;
  std::vector<Scope> scopes_;
  uint32_t source_file_ = 0, source_line_ = 0;
};

} // namespace simt::ptx
