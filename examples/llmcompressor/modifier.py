"""GPTQ of llm-compressor with a `SecondMoment` for each input of the layers that it quantises."""

import torch
from llmcompressor.modifiers.gptq import GPTQModifier
from pydantic import PrivateAttr

from knowedit_kernels import SecondMoment


class MomentGPTQ(GPTQModifier):
    """In place of `GPTQModifier`, with the same settings; for models of linear layers."""

    _last: tuple = PrivateAttr(default=(None, None))

    def calibrate_module(self, module, args, _output):
        (x, *_), (seen, moment) = args, self._last
        if x is not seen:  # q, k and v read one input, gate and up another: each is added once
            moment = self._hessians.get(module) or SecondMoment(x.shape[-1], device=x.device)
            self._last = x, moment.update(x)
        self._hessians[module] = moment
        self._num_samples[module] = torch.tensor(float(moment.count))

    def compress_modules(self):
        self._last = None, None
        self._hessians = self.summed()
        super().compress_modules()

    def summed(self):
        """The Hessians as llm-compressor wants them: float32, not yet divided by the count."""
        sums = {moment: (2 * moment.sum()).float() for moment in {*self._hessians.values()}}
        return {module: sums[moment] for module, moment in self._hessians.items()}
