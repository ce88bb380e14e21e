import pytest
import torch

from methods.recipe import Family
from tests.family import write_family

# Two threads fight over tiny products; one is faster and leaves room for other workers.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return write_family(tmp_path_factory.mktemp("family"))
