// Settings of a neuron as the operators are given them.
#pragma once

#include "../cpu/neuron.h"
#include "common.h"

namespace atsnn {

NeuronParams neuron_params(const OptionalTensor& inv_tau, c10::string_view kind, double tau,
                           double v_threshold, std::optional<double> v_reset, bool decay_input,
                           bool detach_reset, c10::string_view surrogate, double alpha);

}  // namespace atsnn
