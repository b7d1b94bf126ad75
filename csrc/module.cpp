// The pybind11 half of the binding: objects (engine, hook, process groups, futures). Tensors in, tensors out goes through ops.cpp:
// a TORCH_LIBRARY op cannot take a Python object, and pybind11 functions have no schema for torch.compile.
// pybind11 is the copy bundled with torch; another copy would import and then fail to recognise torch's types (self_test below).
#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <torch/csrc/jit/python/pybind_utils.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/csrc/distributed/c10d/reducer.hpp>

#include "cpu/compensate_select_filter.h"
#include "engine.h"
#include "hook.h"
#include "ranges.h"
#include "wire_format.h"

namespace compressed_ddp {
namespace {

namespace py = pybind11;
using FuturePtr = std::shared_ptr<torch::jit::PythonFutureWrapper>;
using release_gil = py::gil_scoped_release;
using CostsTuple = std::array<double, 5>; // the members of ExchangeCosts
using PlaceTuple = std::tuple<std::string, int64_t, int64_t, std::vector<int64_t>, std::vector<int64_t>>;

// A Python hook must complete its future with a Python object (PythonCommHook::parseHookResult). It is made here, while the GIL is
// held, so that completing the future later needs none.
c10::IValue python_result(const at::Tensor& tensor) { return torch::jit::toIValue(py::cast(tensor), c10::PyObjectType::get()); }

template <typename Reduce>
FuturePtr unlocked(Reduce&& reduce) {
  c10::intrusive_ptr<c10::ivalue::Future> future;
  {
    const release_gil released;
    future = reduce();
  }
  return std::make_shared<torch::jit::PythonFutureWrapper>(std::move(future));
}

// Released with the GIL, wherever its last owner ends.
std::shared_ptr<py::object> shared_with_gil(py::object object) {
  return {new py::object(std::move(object)), [](py::object* held) {
            const py::gil_scoped_acquire gil;
            delete held;
          }};
}

// Calls the user's density(step) with the GIL.
std::function<double(int64_t)> density_function(py::object callable) {
  const std::shared_ptr<py::object> holder = shared_with_gil(std::move(callable));
  return [holder](int64_t step) {
    const py::gil_scoped_acquire gil;
    try {
      return (*holder)(step).cast<double>();
    } catch (const py::error_already_set& error) { // must not travel through threads without the GIL
      throw std::runtime_error("TopKEFState: density(" + std::to_string(step) + ") raised " +
                               py::str(error.type().attr("__name__")).cast<std::string>() + ": " +
                               py::str(error.value()).cast<std::string>());
    } catch (const py::cast_error&) {
      throw std::runtime_error("TopKEFState: density(" + std::to_string(step) + ") must return a number");
    }
  };
}

ExchangeCosts costs_of(const CostsTuple& costs) { return {costs[0], costs[1], costs[2], costs[3], costs[4]}; }

py::tuple choice_tuple(const ExchangeChoice& choice) {
  return py::make_tuple(choice.bucket, choice.numel, std::string(name_of(choice.kind)), choice.prediction.sparse_s,
                        choice.prediction.dense_s);
}

// Called from the hook, with the GIL.
void use_groups(EngineOptions& options, py::object groups) {
  const std::shared_ptr<py::object> holder = shared_with_gil(std::move(groups));
  const auto call = [holder](const char* what, auto&& function) {
    const py::gil_scoped_acquire gil;
    try {
      return function(*holder);
    } catch (const py::error_already_set& error) { // must not travel through threads without the GIL
      throw std::runtime_error(std::string("compressed_ddp: ") + what + ": " + py::str(error.value()).cast<std::string>());
    }
  };
  options.make_group = [call](const EngineOptions::ProcessGroupPtr& process_group, const std::vector<int64_t>& ranks,
                              c10::DeviceType type) {
    return call(
        "a process group that this exchange needs could not be made (usually another rank has died or is stalled: look for the "
        "first error in the other ranks' logs)",
        [&](const py::object& object) {
          return object.attr("make")(process_group, ranks, c10::DeviceTypeName(type, true)).cast<EngineOptions::ProcessGroupPtr>();
        });
  };
  options.find_ranks_per_node = [call](const EngineOptions::ProcessGroupPtr& process_group) {
    return call("the ranks of a node could not be found out",
                [&](const py::object& object) { return object.attr("find_ranks_per_node")(process_group).cast<int64_t>(); });
  };
  options.measure_costs = [call](const EngineOptions::ProcessGroupPtr& process_group, c10::Device device) {
    return call("what exchanges cost could not be measured",
                [&](const py::object& object) { return costs_of(object.attr("measure_costs")(process_group, device).cast<CostsTuple>()); });
  };
  options.note_choice = [call](const ExchangeChoice& choice) {
    call("a choice of exchange='auto' could not be logged",
         [&](const py::object& object) { return object.attr("note_choice")(choice_tuple(choice)); });
  };
}

// A deleter with the GIL: the engine keeps the results of the last step, which are Python objects.
std::shared_ptr<Engine> make_engine(py::object density, const std::string& scope, const std::string& value_format,
                                    const std::string& exchange, const std::string& auto_sparse, const std::string& auto_dense,
                                    int64_t ranks_per_node, py::object groups, bool error_feedback, int64_t dense_steps,
                                    int64_t min_compress_numel, bool exempt_needs_names) {
  EngineOptions options;
  if (PyCallable_Check(density.ptr()) != 0)
    options.density_of_step = density_function(std::move(density));
  else
    options.density = density.cast<double>();
  options.scope = scope == "bucket" ? Scope::kBucket : scope == "chunk" ? Scope::kChunk : Scope::kTensor;
  options.value_format = value_format_of(value_format);
  options.exchange = exchange_kind_of(exchange); // checked by TopKEFState
  options.automatic.sparse = exchange_kind_of(auto_sparse);
  options.automatic.dense = exchange_kind_of(auto_dense).value_or(ExchangeKind::kDense);
  options.ranks_per_node = ranks_per_node;
  use_groups(options, std::move(groups));
  options.error_feedback = error_feedback;
  options.dense_steps = dense_steps;
  options.min_compress_numel = min_compress_numel;
  options.exempt_needs_names = exempt_needs_names;
  return std::shared_ptr<Engine>(new Engine(std::move(options)), [](Engine* engine) {
    const py::gil_scoped_acquire gil;
    engine->drop_results();
    delete engine;
  });
}

py::dict metrics_dict(const Metrics& m) {
  py::dict d;
  const double bytes_sent = m.bytes_sent.sum() + m.agreement_bytes; // not in_node
  d["compressed_ddp/bytes_sent"] = bytes_sent;
  d["compressed_ddp/bytes_sent_all_gather"] = m.bytes_sent.all_gather;
  d["compressed_ddp/bytes_sent_all_to_all"] = m.bytes_sent.all_to_all;
  d["compressed_ddp/bytes_sent_all_reduce"] = m.bytes_sent.all_reduce;
  d["compressed_ddp/bytes_sent_agreement"] = m.agreement_bytes;
  d["compressed_ddp/bytes_sent_in_node"] = m.bytes_sent.in_node();
  d["compressed_ddp/bytes_sent_in_node_all_to_all"] = m.bytes_sent.in_node_all_to_all;
  d["compressed_ddp/bytes_sent_in_node_all_gather"] = m.bytes_sent.in_node_all_gather;
  d["compressed_ddp/dense_bytes"] = m.dense_bytes;
  d["compressed_ddp/compression_ratio"] = m.payload_bytes > 0 ? m.gradient_bytes / m.payload_bytes : std::nan("");
  d["compressed_ddp/wire_ratio"] = bytes_sent > 0 ? m.dense_bytes / bytes_sent : std::nan("");
  d["compressed_ddp/residual_norm"] = m.residual_norm;
  d["compressed_ddp/gradient_norm"] = m.gradient_norm;
  d["compressed_ddp/captured_energy"] = m.captured_energy;
  d["compressed_ddp/step"] = static_cast<double>(m.step < 0 ? 0 : m.step);
  return d;
}

// A future that fails in C++ terms: torch.futures.Future.set_exception would complete it with an exception object as its value.
FuturePtr failed_future(const std::string& message, bool is_value_error) {
  auto future = c10::make_intrusive<c10::ivalue::Future>(c10::PyObjectType::get());
  try {
    TORCH_CHECK_VALUE(!is_value_error, message);
    throw std::runtime_error(message);
  } catch (...) {
    future->setError(std::current_exception());
  }
  return std::make_shared<torch::jit::PythonFutureWrapper>(std::move(future));
}

// A GradBucket and a ProcessGroup must be recognised as torch's own types; with another pybind11 they are two types of one name.
void self_test() {
  const py::module_ c10d = py::module_::import("torch._C._distributed_c10d");
  const auto knows = [&](const std::type_info& type, const char* name) {
    const auto* known = py::detail::get_type_info(type);
    return known != nullptr && reinterpret_cast<PyObject*>(known->type) == c10d.attr(name).ptr();
  };
  if (!knows(typeid(c10d::GradBucket), "GradBucket") || !knows(typeid(c10d::ProcessGroup), "ProcessGroup"))
    throw py::import_error("it was compiled with another pybind11 than torch uses and cannot see torch's types");
}

} // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("torch_version") = COMPRESSED_DDP_TORCH_VERSION;
  m.attr("wire_version") = kWireVersion;
  m.attr("payload_header_bytes") = sizeof(PayloadHeader);
  m.attr("instruction_set") = best_filter().name;
#if COMPRESSED_DDP_CUDA
  m.attr("built_with_cuda") = true;
  m.def("has_cuda_stages", &has_cuda_stages, py::arg("device"), py::call_guard<release_gil>());
#else
  m.attr("built_with_cuda") = false;
  m.def("has_cuda_stages", [](at::Device) { return false; }, py::arg("device"));
#endif
  m.def("self_test", &self_test);
  m.def("failed_future", &failed_future, py::arg("message"), py::arg("is_value_error"));
  m.def("selection_k", &selection_k, py::arg("density"), py::arg("numel"));
  m.def(
      "payload_bytes",
      [](const std::vector<int64_t>& segments, const std::vector<int64_t>& groups, const std::vector<int64_t>& k,
         const std::string& value_format) { return payload_bytes(Layout::make(segments, groups, k, value_format_of(value_format))); },
      py::arg("segments"), py::arg("groups"), py::arg("k"), py::arg("value_format"));

  m.def(
      "range_ends",
      [](const std::vector<std::pair<int64_t, bool>>& parts, int64_t count, double density, const std::string& value_format,
         bool one_selection) {
        std::vector<RangePart> of;
        for (const auto& [numel, dense] : parts) of.push_back({numel, dense});
        return range_ends(of, count, {density, value_format_of(value_format), one_selection});
      },
      py::arg("parts"), py::arg("count"), py::arg("density"), py::arg("value_format"), py::arg("one_selection"));

  py::class_<Engine, std::shared_ptr<Engine>>(m, "Engine")
      .def(py::init(&make_engine), py::kw_only(), py::arg("density"), py::arg("scope"), py::arg("value_format"), py::arg("exchange"),
           py::arg("auto_sparse"), py::arg("auto_dense"), py::arg("ranks_per_node"), py::arg("groups"), py::arg("error_feedback"),
           py::arg("dense_steps"), py::arg("min_compress_numel"), py::arg("exempt_needs_names"))
      .def("set_process_group", &Engine::set_process_group, py::call_guard<release_gil>())
      .def("has_process_group", &Engine::has_process_group, py::call_guard<release_gil>())
      .def("bind",
           [](Engine& engine, const std::vector<std::tuple<std::string, at::Tensor, bool>>& parameters) {
             std::vector<NamedParameter> named;
             named.reserve(parameters.size());
             for (const auto& [name, parameter, exempt] : parameters) named.push_back({name, parameter, exempt});
             const release_gil released;
             engine.bind(named);
           })
      .def("is_bound", &Engine::is_bound, py::call_guard<release_gil>())
      .def("reduce_bucket",
           [](Engine& engine, c10d::GradBucket& bucket) {
             c10::IValue result = python_result(bucket.getBuffer());
             return unlocked([&] { return engine.reduce_bucket(bucket, std::move(result), c10::PyObjectType::get()); });
           })
      .def("reduce_named",
           [](Engine& engine, const at::Tensor& buffer, const at::Tensor& result, const std::string& name,
              const std::vector<int64_t>& segments, bool exempt) {
             return unlocked(
                 [&] { return engine.reduce_named(buffer, name, result.sizes().vec(), segments, exempt, result, c10::TensorType::get()); });
           })
      .def("reduce_parameters",
           [](Engine& engine, const at::Tensor& buffer, const std::vector<at::Tensor>& parameters, const std::vector<uint8_t>& unused) {
             return unlocked([&] { return engine.reduce_parameters(buffer, parameters, unused, buffer, c10::TensorType::get()); });
           })
      .def("completed_steps", &Engine::completed_steps, py::call_guard<release_gil>())
      .def("rollback", &Engine::rollback, py::call_guard<release_gil>())
      .def("reset", &Engine::reset, py::call_guard<release_gil>())
      .def("export_residuals", &Engine::export_residuals, py::call_guard<release_gil>())
      // Of whole residuals: no shard, no places. A place: name, begin, end, sizes, strides.
      .def("load",
           [](Engine& engine, int64_t step, const std::vector<std::pair<std::string, at::Tensor>>& residuals,
              const std::optional<std::pair<int64_t, int64_t>>& shard, const std::vector<PlaceTuple>& places) {
             std::vector<ShardPlace> of_shards;
             for (const auto& [name, begin, end, sizes, strides] : places) of_shards.push_back({name, begin, end, sizes, strides});
             const release_gil released;
             engine.load(step, residuals, shard.has_value() ? std::optional(Shard{shard->first, shard->second}) : std::nullopt, of_shards);
           })
      .def("costs",
           [](Engine& engine) -> std::optional<CostsTuple> {
             const release_gil released;
             const std::optional<ExchangeCosts> costs = engine.costs();
             if (!costs.has_value()) return std::nullopt;
             return CostsTuple{costs->latency_s, costs->byte_s, costs->select_entry_s, costs->decode_entry_s, costs->decode_selected_s};
           })
      .def("use_costs",
           [](Engine& engine, const CostsTuple& costs) {
             const release_gil released;
             engine.use_costs(costs_of(costs));
           })
      .def("choices",
           [](Engine& engine) {
             std::vector<ExchangeChoice> choices;
             {
               const release_gil released;
               choices = engine.choices();
             }
             py::list tuples;
             for (const ExchangeChoice& choice : choices) tuples.append(choice_tuple(choice));
             return tuples;
           })
      .def("shard",
           [](Engine& engine) -> std::optional<std::pair<int64_t, int64_t>> {
             const release_gil released;
             const std::optional<Shard> shard = engine.shard();
             if (!shard.has_value()) return std::nullopt;
             return std::pair(shard->index, shard->count);
           })
      .def("shard_places",
           [](Engine& engine) {
             std::vector<ShardPlace> places;
             {
               const release_gil released;
               places = engine.shard_places();
             }
             std::vector<PlaceTuple> tuples;
             for (const ShardPlace& place : places) tuples.emplace_back(place.name, place.begin, place.end, place.sizes, place.strides);
             return tuples;
           })
      .def("metrics",
           [](Engine& engine) {
             Metrics metrics;
             engine.drop_results(); // the GIL is held, and after backward() nobody needs them
             {
               const release_gil released;
               metrics = engine.metrics();
             }
             return metrics_dict(metrics);
           })
      .def("has_compressed", &Engine::has_compressed, py::call_guard<release_gil>())
      .def("is_compressed", &Engine::is_compressed, py::call_guard<release_gil>());

  m.def(
      "register_hook",
      [](c10d::Reducer& reducer, const std::shared_ptr<Engine>& engine) {
        reducer.register_comm_hook(std::make_unique<TopKEFHook>(engine));
      },
      py::arg("reducer"), py::arg("engine"));
}

} // namespace compressed_ddp
