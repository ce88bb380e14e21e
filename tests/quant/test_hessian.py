import pytest
import torch

from quant.gptq import Hessian
from tests.quant import oracle

K = 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_hessian_is_the_mean_over_all_rows(dtype: torch.dtype) -> None:
    x = torch.randn(97, K, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seen = Hessian(K, dtype=dtype, device=x.device)
    for batch in (x[:60].view(3, 20, K), x[60:61], x[61:61], x[61:]):
        seen.add(batch)
    assert seen.num_rows == 97
    assert seen.mean.dtype == dtype
    limit = 1e-14 if dtype == torch.float64 else 1e-6
    assert oracle.worst(seen.mean, (2 / 97 * x.t() @ x).numpy()) < limit


def test_half_precision_inputs_are_widened_before_the_product() -> None:
    x = torch.full((4, K), 300.0, dtype=torch.float16)  # squares overflow float16
    seen = Hessian(K, dtype=torch.float32, device=x.device)
    seen.add(x)
    assert torch.allclose(seen.mean, torch.full((K, K), 2 * 300.0**2))


def test_a_hessian_of_nothing_is_refused() -> None:
    seen = Hessian(K, dtype=torch.float32, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="must have seen inputs, got none"):
        _ = seen.mean
    with pytest.raises(ValueError, match="must be float32 or float64"):
        Hessian(K, dtype=torch.float16, device=torch.device("cpu"))
