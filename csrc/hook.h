// The C++ entry: the engine as a communication hook on DDP's reducer. No Python, no GIL in the backward pass.
#pragma once

#include <torch/csrc/distributed/c10d/comm.hpp>

#include <memory>

#include "engine.h"

namespace compressed_ddp {

class TopKEFHook : public c10d::CommHookInterface {
 public:
  explicit TopKEFHook(std::shared_ptr<Engine> engine) : engine_(std::move(engine)) {}

  c10::intrusive_ptr<c10::ivalue::Future> runHook(c10d::GradBucket& bucket) override {
    return engine_->reduce_bucket(bucket, bucket.getBuffer(), c10::TensorType::get());
  }
  at::Tensor parseHookResult(const c10::IValue& result) override { return result.toTensor(); }

 private:
  std::shared_ptr<Engine> engine_;
};

} // namespace compressed_ddp
