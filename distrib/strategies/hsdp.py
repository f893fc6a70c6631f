"""hsdp: each group of ranks holds a copy of the model, sharded within the group as under fsdp2."""

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from distrib.config import PositiveInt
from distrib.errors import ConfigError
from distrib.strategies.fsdp2 import FSDP2


class HSDP(FSDP2):
    """Hybrid sharding (Zhao et al., PyTorch FSDP, VLDB 2023, section 3.2.2).

    A group has consecutive ranks, usually those of one machine. Parameters are gathered within a group. Gradients are
    summed across the groups, so only gradient shards are sent between machines.
    """

    class Options(FSDP2.Options):
        shard_size: PositiveInt  # ranks in a group; usually the GPUs of a machine

    @property
    def shard_size(self) -> int:
        return int(self.options.shard_size)

    def mesh(self) -> DeviceMesh:
        shape = (self.copies, self.shard_size)
        return init_device_mesh(self.world.device.type, shape, mesh_dim_names=("replicate", "shard"))

    def check(self) -> None:
        if self.world.world_size % self.shard_size:
            fitting = [size for size in range(1, self.world.world_size + 1) if self.world.world_size % size == 0]
            raise ConfigError(
                f"strategy.shard_size: {self.shard_size} does not divide {self.world.world_size} processes; take "
                f"{', '.join(str(size) for size in fitting)}"
            )
