import torch

from methods.tree import Tree


def make(tokens: list[int], parents: list[int]) -> Tree:
    return Tree(tokens=torch.tensor(tokens), parents=torch.tensor(parents))


def test_siblings_do_not_see_each_other() -> None:
    tree = make([7, 8, 9, 10], [-1, 0, 0, 1])
    assert tree.mask.int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 0, 1, 0],
        [1, 1, 0, 1],
    ]
    assert tree.depths.tolist() == [0, 1, 1, 2]


def test_a_chain_sees_everything_before_it() -> None:
    tree = Tree.chain([3, 4, 5, 6, 7, 8])
    assert tree.parents.tolist() == [-1, 0, 1, 2, 3, 4]
    assert torch.equal(tree.mask, torch.ones(6, 6).tril().bool())


def test_masks_of_trees_beyond_64_nodes_follow_the_parents() -> None:
    generator = torch.Generator().manual_seed(0)
    n = 200
    parents = [-1] + [int(torch.randint(0, i, (), generator=generator)) for i in range(1, n)]
    expected = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        j = i
        while j >= 0:
            expected[i, j] = True
            j = parents[j]
    assert torch.equal(make(list(range(n)), parents).mask, expected)
