"""transformers' tensor-parallel and FSDP suites on Mini: ranks on the CPU, joined by gloo."""

import pytest
from conformance_mini.model_tester import OfOneShape, classes_for_shapes
from transformers_tests import test_fsdp_mixin, test_tensor_parallel_mixin
from transformers_tests.test_fsdp_mixin import FSDPTesterMixin
from transformers_tests.test_tensor_parallel_mixin import TensorParallelTesterMixin

pytestmark = pytest.mark.slow

# Both files run their multi-process tests on a few chosen models, and say that None runs them on all.
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None


class TensorParallelSuite(OfOneShape, TensorParallelTesterMixin):
    pass


class FSDPSuite(OfOneShape, FSDPTesterMixin):
    def _skip_if_insufficient_devices(self, world_size: int) -> None:
        """The mixin wants a core for each rank; ranks on the CPU can take turns, so its tests of four run anywhere."""


globals().update(classes_for_shapes(TensorParallelSuite))
# The mixin sets the number of key/value heads to that of the query heads, which leaves two of the four shapes that
# differ: with that, MQA + LayerNorm is MHA + LayerNorm, and GQA + RMSNorm is a part of the last one.
globals().update(classes_for_shapes(FSDPSuite, ["MHA + LayerNorm", "GQA + RMSNorm + QK-norm"]))
