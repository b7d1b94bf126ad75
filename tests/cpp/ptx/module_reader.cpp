#include "module_reader.h"

#include "cursor.h"
#include "declarations.h"
#include "function_reader.h"

namespace simt::ptx {
namespace {

class ModuleReader {
 public:
  ModuleReader(std::string_view text, const std::string& name) : cursor_(text, name) { module_.name = name; }

  Module read() {
    read_header();
    while (!cursor_.at_end()) read_top_level();
    return std::move(module_);
  }

 private:
  void read_header() {
    cursor_.expect(".version");
    const Token& version = cursor_.take();
    if (version.kind != TokenKind::kNumber || version.text.size() < 3 || version.text[1] != '.')
      cursor_.fail(version, "expected a version such as 9.0");
    cursor_.expect(".target");
    do {
      const Token& target = cursor_.peek();
      const std::string word = cursor_.take_word();
      if (word.starts_with("sm_"))
        module_.target = word;
      else if (word != "debug")
        cursor_.fail(target, "unknown target '" + word + "'");
    } while (cursor_.accept(","));
    cursor_.expect(".address_size");
    const Token& size = cursor_.peek();
    if (cursor_.take_unsigned() != 64) cursor_.fail(size, "addresses that are not of 64 bits");
  }

  void read_top_level() {
    const Token& at = cursor_.peek();
    if (cursor_.accept(";")) return;
    if (cursor_.accept(".file")) return read_file();
    if (cursor_.accept(".section")) { // debug information: .loc says all that a report needs
      cursor_.take_word();
      return cursor_.skip_braces();
    }
    if (cursor_.accept(".pragma")) {
      while (!cursor_.accept(";")) cursor_.take();
      return;
    }
    bool is_extern = false;
    while (true) {
      if (cursor_.accept(".extern"))
        is_extern = true;
      else if (!cursor_.accept(".visible") && !cursor_.accept(".weak") && !cursor_.accept(".common"))
        break;
    }
    if (cursor_.accept(".entry")) return read_function(true);
    if (cursor_.accept(".func")) return read_function(false);
    if (is_extern && !cursor_.peek().is(".shared")) cursor_.fail(at, "a variable of another module");
    for (Variable& variable : read_variables(cursor_, is_extern)) {
      if (variable.space == StateSpace::kLocal || variable.space == StateSpace::kParam)
        cursor_.fail(at, "a variable of this state space outside functions");
      module_.variables.push_back(std::move(variable));
    }
  }

  // .file 1 "name" {, time, size}
  void read_file() {
    const uint64_t number = cursor_.take_unsigned();
    const Token& name = cursor_.take();
    if (name.kind != TokenKind::kText || number > 100000) cursor_.fail(name, "expected the name of a file");
    if (module_.files.size() <= number) module_.files.resize(number + 1);
    module_.files[number] = std::string(name.text);
    while (cursor_.accept(",")) cursor_.take_unsigned();
  }

  void read_function(bool is_kernel) {
    Function function;
    function.is_kernel = is_kernel;
    const auto add = [&](std::vector<Variable> variables, std::vector<uint32_t>& indices) {
      for (Variable& variable : variables) {
        indices.push_back(static_cast<uint32_t>(function.variables.size()));
        function.variables.push_back(std::move(variable));
      }
    };
    if (cursor_.peek().is("(")) add(read_parameters(cursor_), function.results);
    function.name = cursor_.take_word();
    if (cursor_.peek().is("(")) add(read_parameters(cursor_), function.parameters);
    read_performance_directives(function);
    if (!cursor_.accept(";")) {
      function.is_defined = true;
      FunctionReader(cursor_, module_, function).read();
    }
    module_.functions.push_back(std::move(function));
  }

  void read_performance_directives(Function& function) {
    while (true) {
      if (cursor_.accept(".maxntid") || cursor_.accept(".reqntid")) {
        function.max_threads = 1;
        do {
          function.max_threads *= cursor_.take_unsigned();
        } while (cursor_.accept(","));
      } else if (cursor_.accept(".minnctapersm") || cursor_.accept(".maxnctapersm") || cursor_.accept(".maxnreg")) {
        cursor_.take_unsigned();
      } else if (cursor_.accept(".pragma")) {
        while (!cursor_.accept(";")) cursor_.take();
      } else if (!cursor_.accept(".noreturn")) {
        return;
      }
    }
  }

  Cursor cursor_;
  Module module_;
};

} // namespace

Module read_module(std::string_view text, const std::string& name) { return ModuleReader(text, name).read(); }

} // namespace simt::ptx
