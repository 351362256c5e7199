// Settings of a neuron as the operators are given them.
#pragma once

#include <string_view>

#include "../cpu/neuron.h"
#include "common.h"

namespace atsnn {

// How neurons of a kind are charged.
inline Charge charge_of(std::string_view kind, bool decay_input) {
  return kind == "if" ? Charge::integrate : decay_input ? Charge::decay : Charge::no_decay;
}

NeuronParams neuron_params(const OptionalTensor& inv_tau, c10::string_view kind, double tau,
                           double v_threshold, std::optional<double> v_reset, bool decay_input,
                           bool detach_reset, c10::string_view surrogate, double alpha);

}  // namespace atsnn
