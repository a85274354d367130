"""The key-value cache: what attention keeps of earlier tokens, so that a new one costs only its own computation.

B prompts, T tokens of this call, S tokens seen so far (cache + T), K kv heads, E head dim.
"""
import torch


class KVCache:
    """Keys and values of all earlier tokens: per layer two float[B, K, capacity, E], of which `length` are filled.

    `Qwen2Model.forward` appends and advances `length`; `truncate` takes tokens back. Capacity grows in blocks.
    """
    BLOCK = 256                 # tokens: growing copies everything, so not at every token

    def __init__(self):
        self.length = 0         # tokens, the same for every layer between two calls of the model
        self.layers = {}        # layer index -> [keys, values]

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
        """Store k and v float[B, K, T, E] of new tokens; return those of all tokens, float[B, K, S, E] each."""
        end = self.length + k.shape[2]
        room = self.layers[layer][0].shape[2] if layer in self.layers else 0
        if end > room:
            capacity = -(-end // self.BLOCK) * self.BLOCK
            grown = [t.new_empty(t.shape[0], t.shape[1], capacity, t.shape[3]) for t in (k, v)]
            for new, old in zip(grown, self.layers.get(layer, ())):
                new[:, :, :self.length] = old[:, :, :self.length]
            self.layers[layer] = grown
        for stored, new in zip(self.layers[layer], (k, v)):
            stored[:, :, self.length:end] = new
        return [stored[:, :, :end] for stored in self.layers[layer]]

    def truncate(self, length: int) -> None:
        """Forget every token from position `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot cut the cache to {length} tokens, it holds {self.length}")
        self.length = length


def copied(rows: list[tuple[KVCache, int, int, int]], places: int = 0) -> KVCache:
    """Copy rows, each (cache, its row, start, end), into one new cache, aligned at the end; at least `places` rows."""
    new = KVCache()
    new.length = max(end - start for _, _, start, end in rows)
    capacity = (new.length // KVCache.BLOCK + 1) * KVCache.BLOCK if places else new.length
    for layer, both in rows[0][0].layers.items():
        new.layers[layer] = []
        for kind, like in enumerate(both):              # keys, values: float[B, K, S, E]
            # 0, not empty: attention gives padding no weight, but 0 times NaN is NaN
            t = like.new_zeros(max(len(rows), places), like.shape[1], capacity, like.shape[3])
            for place, (cache, row, start, end) in enumerate(rows):
                t[place, :, new.length - (end - start):new.length] = cache.layers[layer][kind][row, :, start:end]
            new.layers[layer].append(t)
    return new
