"""Keys and values in memory with room to spare, so that one more token does not copy the cache."""

import torch


class KeyRoomMixin:
    """Mixin for dynamic caches whose layers keep `keys` and `values` `[batch, heads, length, channels]`."""

    def empty_room(self) -> None:
        """Forget the memory. Called before the first token, too."""
        # By layer: the memory of keys and values, the slot after the last one, and the keys of the layer, which are a view of it.
        self._room: dict[int, tuple[list[torch.Tensor], int, torch.Tensor]] = {}

    def make_room(self, layer_idx: int, steps: int = 1) -> tuple[list[torch.Tensor], int, int]:
        """Add steps whose keys and values are still to be written.

        Args:
            layer_idx (`int`): of a layer that holds keys.
            steps (`int`): how many to add, to a sliding layer at most one less than its window.

        Returns:
            The memory of keys and values `[batch, heads, slots, channels]`, the slot of the first new step, and the number of
            steps that were cached, in the slots before.
        """
        layer = self.layers[layer_idx]  # type: ignore[attr-defined]
        length, keep = layer.keys.shape[2], None
        if layer.is_sliding:
            keep = layer.sliding_window - 1
            layer.cumulative_length += steps
        memory, end, view = self._room.get(layer_idx, ([], 0, None))
        if view is not layer.keys or end + steps > memory[0].shape[2]:
            # Twice the room once it is full; only what is needed after a batch was reordered, which makes a copy anyway.
            room = (length + steps) * (2 if view is layer.keys else 1)
            memory = [x.new_empty(*x.shape[:2], room, x.shape[3]) for x in (layer.keys, layer.values)]
            memory[0][:, :, :length].copy_(layer.keys)
            memory[1][:, :, :length].copy_(layer.values)
            end = length
        first = end - length
        if keep is not None and length + steps > keep:
            first = end + steps - keep
        layer.keys, layer.values = (x[:, :, first : end + steps] for x in memory)
        self._room[layer_idx] = (memory, end + steps, layer.keys)
        return memory, end, length

    def start_room(self, layer_idx: int, memory: list[torch.Tensor], end: int) -> None:
        """Take new memory, in which the keys of a layer end before slot `end`."""
        self._room[layer_idx] = (memory, end, self.layers[layer_idx].keys)  # type: ignore[attr-defined]


__all__ = ["KeyRoomMixin"]
