"""The shortest honest script: torchrun --standalone --nproc-per-node=2 minimal_ddp.py

An ordinary DistributedDataParallel script on the real 8x8 digits of scikit-learn; the marked lines
are all that compressed_ddp adds.
"""

import os

import torch
from sklearn.datasets import load_digits
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from compressed_ddp import TopKEFState, topk_ef_hook  # <- compressed_ddp

if "RANK" not in os.environ:
    raise SystemExit(__doc__)

distributed.init_process_group("gloo")
torch.manual_seed(0)

digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 16
labels = torch.tensor(digits.target)
train, test = slice(0, 1440), slice(1440, None)

net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
model = DistributedDataParallel(net)
state = TopKEFState(density=0.01)  # <- compressed_ddp: 1 % of each gradient tensor is sent
model.register_comm_hook(state, topk_ef_hook)  # <- compressed_ddp

dataset = TensorDataset(images[train], labels[train])
sampler = DistributedSampler(dataset, seed=0)
loader = DataLoader(dataset, batch_size=32, sampler=sampler)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for epoch in range(20):
    sampler.set_epoch(epoch)
    for batch, target in loader:
        loss = nn.functional.cross_entropy(model(batch), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

if distributed.get_rank() == 0:
    accuracy = (net(images[test]).argmax(1) == labels[test]).float().mean().item()
    metrics = state.metrics()  # <- compressed_ddp
    sent, dense = (metrics[f"compressed_ddp/{name}"] for name in ("bytes_sent", "dense_bytes"))
    print(f"accuracy {100 * accuracy:.1f} %; {sent:,.0f} bytes per step instead of {dense:,.0f}")
distributed.destroy_process_group()
