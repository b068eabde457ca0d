"""The operations of Native Sparse Attention serving: tensors in, tensors out.

Every op exists twice under one name and signature: in plain torch (``reference``, the whole
contract on any device, and the CPU backend) and in Triton (``gpu``). ``dispatch`` chooses one by
device. Nothing here imports the rest of the project, and importing this package does not import
Triton.

The one legend of shape letters, used in every docstring and tile comment:

====  =======================================================================================
T     tokens of a step, all requests packed
B     requests (rows) of a step
Hq    query heads
Hkv   key/value heads
G     query heads per KV head, Hq / Hkv
Dk    head dimension of queries and keys
Dv    head dimension of values
P     tokens of a page, which is also the selection block (l' in the paper)
l     tokens that one compressed entry covers
d     stride between compressed entries, in tokens
n     selected blocks per token and KV head
w     window, in tokens
C     compressed entries of a request
M     columns of a block table: the most pages a request of this step may have
S     device slots: pages of raw K/V in the pool
N     block ids: pages with compressed entries in the pool
====  =======================================================================================
"""
