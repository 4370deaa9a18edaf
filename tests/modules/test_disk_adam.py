"""Adam with its states in files: the weights of Adam in memory, and nothing of the states kept."""

from pathlib import Path

import pytest
import torch

from narrows.modules.disk_adam import disk_adam


@pytest.mark.parametrize("early", [True, False])
def test_weights_are_those_of_adam_and_states_are_on_disk(tmp_path: Path, early: bool) -> None:
    nets = []
    for folder in (None, tmp_path):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        net[2].bias.requires_grad_(False)
        free = [p for p in net.parameters() if p.requires_grad]
        options = {"lr": 1e-2, "betas": (0.8, 0.9), "weight_decay": 0.1}
        optimizer = disk_adam(net, folder, early, **options) if folder else torch.optim.Adam(free, **options)
        for step in range(4):
            optimizer.zero_grad()
            net(torch.randn(5, 6, generator=torch.Generator().manual_seed(step))).square().sum().backward()
            optimizer.step()
        nets.append((net, optimizer))
    (plain, _), (ours, optimizer) = nets
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), ours.parameters(), strict=True))
    assert not optimizer.state
    sizes = sorted(file.stat().st_size for file in tmp_path.iterdir())
    assert sizes == sorted(4 * (1 + 2 * p.numel()) for p in ours.parameters() if p.requires_grad)
