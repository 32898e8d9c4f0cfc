"""Train a small network on handwritten digits with DDP; start it with `torchrun --nproc-per-node 4`."""

import sys

import torch
import torch.distributed as dist
from handwriting import handwritten_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

torch.set_num_threads(1)
torch.manual_seed(0)
dist.init_process_group("gloo")
train_data, val_data = handwritten_digits()
epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 3

model = nn.Sequential(
    nn.Conv2d(1, 16, 5, stride=2),
    nn.ReLU(),
    nn.Conv2d(16, 32, 5, stride=2),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(512, 10),
)
model = DistributedDataParallel(model)
loader = DataLoader(train_data, batch_size=32, sampler=DistributedSampler(train_data))
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
loss_function = nn.CrossEntropyLoss()

for epoch in range(epochs):
    for images, labels in loader:
        loss = loss_function(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with torch.no_grad():
        images, labels = val_data.tensors
        accuracy = (model.module(images).argmax(1) == labels).float().mean()
    if dist.get_rank() == 0:
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, validation accuracy {accuracy:.3f}")

dist.destroy_process_group()
