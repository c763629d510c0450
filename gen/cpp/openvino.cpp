// The attention of attention.hpp, the group norm of norm.hpp, the layers of linear.hpp and the convolutions of winograd.hpp as
// operations of OpenVINO.

#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/op/op.hpp>

#include "attention.hpp"
#include "linear.hpp"
#include "norm.hpp"
#include "winograd.hpp"

namespace {

// What an operation reads; null: it is not given that many inputs.
template <class Value>
const Value* values_of(const ov::TensorVector& inputs, size_t which) {
  return which < inputs.size() ? static_cast<const Value*>(inputs[which].data()) : nullptr;
}

bool is_low(const ov::Tensor& tensor) { return tensor.get_element_type() == ov::element::bf16; }

// Inputs are queries, keys and values, bfloat16 (B, length, heads, d) where `turned` says so, (B, heads, length, d) where
// not, or all three in one (B, length, 3, heads, d); the answer is (B, queries, heads, d).
class TileAttention : public ov::op::Op {
 public:
  OPENVINO_OP("TileAttention", "unclip");

  TileAttention() = default;
  TileAttention(const ov::OutputVector& inputs, std::vector<int64_t> turned, float scale, int64_t threads)
      : Op(inputs), turned_(std::move(turned)), scale_(scale), threads_(threads) {
    constructor_validate_and_infer_types();
  }

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    return std::make_shared<TileAttention>(inputs, turned_, scale_, threads_);
  }

  bool visit_attributes(ov::AttributeVisitor& visitor) override {
    visitor.on_attribute("turned", turned_);
    visitor.on_attribute("scale", scale_);
    visitor.on_attribute("threads", threads_);
    return true;
  }

  void validate_and_infer_types() override {
    if (turned_.empty()) return;  // its attributes are not set yet
    ov::PartialShape answer = get_input_partial_shape(0);
    if (get_input_size() == 1)
      answer = {answer[0], answer[1], answer[3], answer[4]};
    else if (!turned_[0])
      std::swap(answer[1], answer[2]);
    set_output_type(0, get_input_element_type(0), answer);
  }

  bool has_evaluate() const override { return true; }

  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
    const bool together = inputs.size() == 1;
    const auto told = [&](int which) { return together ? Told(inputs[0], which) : Told(inputs[which], turned_[which] > 0); };
    const Told query = told(0), key = told(1), value = told(2), answer(outputs[0], true);
    std::vector<int64_t> steps;
    for (const Told* each : {&query, &key, &value, &answer})
      steps.insert(steps.end(), {each->row_step, each->head_step, each->step});
    attention::attend(query.at, key.at, value.at, answer.at, steps.data(), query.rows, query.heads, query.count, key.count,
                      query.size, scale_, threads_);
    return true;
  }

 private:
  struct Told {
    Told(const ov::Tensor& tensor, bool turned) : at(static_cast<bfloat16*>(const_cast<void*>(tensor.data()))) {
      const ov::Shape& shape = tensor.get_shape();
      rows = shape[0], heads = shape[turned ? 2 : 1], count = shape[turned ? 1 : 2], size = shape[3];
      row_step = shape[1] * shape[2] * shape[3];
      head_step = turned ? size : count * size;
      step = turned ? heads * size : size;
    }
    Told(const ov::Tensor& tensor, int which) : at(static_cast<bfloat16*>(const_cast<void*>(tensor.data()))) {
      const ov::Shape& shape = tensor.get_shape();
      rows = shape[0], heads = shape[3], count = shape[1], size = shape[4];
      at += which * heads * size;
      step = 3 * heads * size;
      row_step = count * step;
      head_step = size;
    }

    bfloat16* at;
    int64_t rows, heads, count, size, row_step, head_step, step;
  };

  std::vector<int64_t> turned_;  // of queries, keys and values
  float scale_ = 1;
  int64_t threads_ = 1;
};

// Of bfloat16 or float32 (B, places, channels) or (B, height, width, channels); `active`: and SiLU behind it.
class GroupNormLast : public ov::op::Op {
 public:
  OPENVINO_OP("GroupNormLast", "unclip");

  GroupNormLast() = default;
  GroupNormLast(const ov::OutputVector& inputs, std::vector<float> scale, std::vector<float> shift, int64_t groups,
                float epsilon, bool active, int64_t threads)
      : Op(inputs),
        scale_(std::move(scale)),
        shift_(std::move(shift)),
        groups_(groups),
        epsilon_(epsilon),
        active_(active),
        threads_(threads) {
    constructor_validate_and_infer_types();
  }

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    return std::make_shared<GroupNormLast>(inputs, scale_, shift_, groups_, epsilon_, active_, threads_);
  }

  bool visit_attributes(ov::AttributeVisitor& visitor) override {
    visitor.on_attribute("scale", scale_);
    visitor.on_attribute("shift", shift_);
    visitor.on_attribute("groups", groups_);
    visitor.on_attribute("epsilon", epsilon_);
    visitor.on_attribute("active", active_);
    visitor.on_attribute("threads", threads_);
    return true;
  }

  void validate_and_infer_types() override { set_output_type(0, get_input_element_type(0), get_input_partial_shape(0)); }

  bool has_evaluate() const override { return true; }

  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
    is_low(inputs[0]) ? compute<bfloat16>(outputs, inputs) : compute<float>(outputs, inputs);
    return true;
  }

 private:
  template <class Value>
  void compute(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
    const ov::Shape& shape = inputs[0].get_shape();
    const size_t channels = shape.back(), places = inputs[0].get_size() / shape[0] / channels;
    norm::compute(values_of<Value>(inputs, 0), static_cast<Value*>(outputs[0].data()), shape[0], places, channels, groups_,
                  scale_.data(), shift_.data(), epsilon_, active_, threads_);
  }

  std::vector<float> scale_, shift_;  // of each channel
  int64_t groups_ = 1;
  float epsilon_ = 0;
  bool active_ = false;
  int64_t threads_ = 1;
};

// What answers (..., in), bfloat16 or float32, by (..., out), row by row.
class RowByRow : public ov::op::Op {
 public:
  using Op::Op;

  void validate_and_infer_types() override {
    ov::PartialShape answer = get_input_partial_shape(0);
    answer[answer.size() - 1] = out_;
    set_output_type(0, get_input_element_type(0), answer);
  }

  bool has_evaluate() const override { return true; }

 protected:
  int64_t out_ = 1;
};

// Of (..., in) to (..., out); the second input are the weights as `linear::Layer` has them, the third, where there
// is one, is added to the answer.
class TileLinear : public RowByRow {
 public:
  OPENVINO_OP("TileLinear", "unclip");

  TileLinear() = default;
  TileLinear(const ov::OutputVector& inputs, std::vector<float> bias, int64_t out, bool normed, float epsilon, bool active,
            bool gated)
      : RowByRow(inputs),
        bias_(std::move(bias)),
        normed_(normed),
        epsilon_(epsilon),
        active_(active),
        gated_(gated) {
    out_ = out;
    constructor_validate_and_infer_types();
  }

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    return std::make_shared<TileLinear>(inputs, bias_, out_, normed_, epsilon_, active_, gated_);
  }

  bool visit_attributes(ov::AttributeVisitor& visitor) override {
    visitor.on_attribute("bias", bias_);
    visitor.on_attribute("out", out_);
    visitor.on_attribute("normed", normed_);
    visitor.on_attribute("epsilon", epsilon_);
    visitor.on_attribute("active", active_);
    visitor.on_attribute("gated", gated_);
    return true;
  }

  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
    is_low(inputs[0]) ? compute<bfloat16>(outputs, inputs) : compute<float>(outputs, inputs);
    return true;
  }

 private:
  template <class Value>
  void compute(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
    const int in = inputs[0].get_shape().back(), out = out_;
    const linear::Layer<Value> layer{in, out, values_of<Value>(inputs, 1), bias_.data(), normed_, active_, gated_, epsilon_};
    linear::compute(layer, values_of<Value>(inputs, 0), values_of<Value>(inputs, 2),
                    static_cast<Value*>(outputs[0].data()), inputs[0].get_size() / in);
  }

  std::vector<float> bias_;
  bool normed_ = false;
  float epsilon_ = 0;
  bool active_ = false, gated_ = false;
};

// Two of them, of which the first has GELU or GEGLU behind it and the second none and no norm: the feed-forward network of
// a transformer. The second input are the weights of the first, the third those of the second, the fourth is added.
class TileFeedForward : public RowByRow {
 public:
  OPENVINO_OP("TileFeedForward", "unclip");

  TileFeedForward() = default;
  TileFeedForward(const ov::OutputVector& inputs, std::vector<float> first, std::vector<float> second, int64_t between,
                 int64_t out, bool normed, float epsilon, bool gated)
      : RowByRow(inputs),
        first_(std::move(first)),
        second_(std::move(second)),
        between_(between),
        normed_(normed),
        epsilon_(epsilon),
        gated_(gated) {
    out_ = out;
    constructor_validate_and_infer_types();
  }

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    return std::make_shared<TileFeedForward>(inputs, first_, second_, between_, out_, normed_, epsilon_, gated_);
  }

  bool visit_attributes(ov::AttributeVisitor& visitor) override {
    visitor.on_attribute("first", first_);
    visitor.on_attribute("second", second_);
    visitor.on_attribute("between", between_);
    visitor.on_attribute("out", out_);
    visitor.on_attribute("normed", normed_);
    visitor.on_attribute("epsilon", epsilon_);
    visitor.on_attribute("gated", gated_);
    return true;
  }

  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
    is_low(inputs[0]) ? compute<bfloat16>(outputs, inputs) : compute<float>(outputs, inputs);
    return true;
  }

 private:
  template <class Value>
  void compute(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
    const int in = inputs[0].get_shape().back(), between = between_, out = out_;
    const auto at = [&](size_t which) { return values_of<Value>(inputs, which); };
    const linear::Layer<Value> first{in, between, at(1), first_.data(), normed_, !gated_, gated_, epsilon_};
    const linear::Layer<Value> second{between, out, at(2), second_.data(), false, false, false, 0};
    linear::compute(first, second, at(0), at(3), static_cast<Value*>(outputs[0].data()), inputs[0].get_size() / in);
  }

  std::vector<float> first_, second_;  // biases
  int64_t between_ = 1;
  bool normed_ = false;
  float epsilon_ = 0;
  bool gated_ = false;
};

// Of (B, height, width, in), bfloat16 or float32. The second input are the transformed weights (out / 32, 16 or 36, ...), of
// F(2x2, 3x3) or of F(4x4, 3x3), whose whole numbers for bfloat16 come as if they were bfloat16, with their `scales`. Where
// `is_told` says so the third is added to every place of a row, float32 (B, out); what is left is added to the answer and
// like it.
class WinogradConvolution : public ov::op::Op {
 public:
  OPENVINO_OP("WinogradConvolution", "unclip");

  WinogradConvolution() = default;
  WinogradConvolution(const ov::OutputVector& inputs, std::vector<float> bias, std::vector<float> scales, bool is_told,
                      int64_t threads)
      : Op(inputs), bias_(std::move(bias)), scales_(std::move(scales)), is_told_(is_told), threads_(threads) {
    constructor_validate_and_infer_types();
  }

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    return std::make_shared<WinogradConvolution>(inputs, bias_, scales_, is_told_, threads_);
  }

  bool visit_attributes(ov::AttributeVisitor& visitor) override {
    visitor.on_attribute("bias", bias_);
    visitor.on_attribute("scales", scales_);
    visitor.on_attribute("is_told", is_told_);
    visitor.on_attribute("threads", threads_);
    return true;
  }

  void validate_and_infer_types() override {
    ov::PartialShape answer = get_input_partial_shape(0);
    answer[3] = bias_.size();
    set_output_type(0, get_input_element_type(0), answer);
  }

  bool has_evaluate() const override { return true; }

  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
    const bool is_small = inputs[1].get_shape()[1] == winograd::Block<float, 2>::PLACES;
    if (is_low(inputs[0]))
      is_small ? compute<bfloat16, 2>(outputs, inputs) : compute<bfloat16, 4>(outputs, inputs);
    else
      is_small ? compute<float, 2>(outputs, inputs) : compute<float, 4>(outputs, inputs);
    return true;
  }

 private:
  template <class Value, int STEP>
  void compute(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
    const ov::Shape& shape = inputs[0].get_shape();
    const auto at = [&](size_t which) { return values_of<Value>(inputs, which); };
    const auto* weight = values_of<typename winograd::Factors<Value, STEP>::Factor>(inputs, 1);
    const winograd::Layer<Value, STEP> layer{int(shape[3]), int(bias_.size()), weight, scales_.data(), bias_.data()};
    const auto* told = is_told_ ? values_of<float>(inputs, 2) : nullptr;
    auto* to = static_cast<Value*>(outputs[0].data());
    const int rows = shape[0], height = shape[1], width = shape[2];
    const winograd::Pictures<Value> pictures{at(0), told, at(is_told_ ? 3 : 2), to, rows, height, width};
    winograd::compute(layer, pictures, threads_);
  }

  std::vector<float> bias_;
  std::vector<float> scales_;  // of weights that are whole numbers
  bool is_told_ = false;
  int64_t threads_ = 1;
};

}  // namespace

OPENVINO_CREATE_EXTENSIONS(std::vector<ov::Extension::Ptr>({std::make_shared<ov::OpExtension<TileAttention>>(),
                                                            std::make_shared<ov::OpExtension<GroupNormLast>>(),
                                                            std::make_shared<ov::OpExtension<TileLinear>>(),
                                                            std::make_shared<ov::OpExtension<TileFeedForward>>(),
                                                            std::make_shared<ov::OpExtension<WinogradConvolution>>()}));
