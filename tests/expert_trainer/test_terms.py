from expert_trainer.terms import WordCounts, top_terms

SEA = ["the boat and the sail", "a boat under sail in the storm", "the storm and the boat"]
KITCHEN = ["the oven and the flour", "flour in the oven", "the bread and flour"]


def terms(cluster: list[str], *others: str, count: int = 10) -> list[str]:
    return top_terms(WordCounts(cluster), WordCounts([*cluster, *others]), count)


def test_a_clusters_own_words_come_first_and_common_ones_last() -> None:
    sea, kitchen = terms(SEA, *KITCHEN), terms(KITCHEN, *SEA)
    assert sea[0] == "boat"
    assert kitchen[0] == "flour"
    assert set(sea[:3]) == {"boat", "sail", "storm"}
    assert "the" not in sea[:3] + kitchen[:2]


def test_one_document_does_not_fill_the_list() -> None:
    assert "zebra" not in terms([*SEA, "zebra " * 500], *KITCHEN)


def test_a_single_cluster_and_a_single_document() -> None:
    assert terms(["one boat"]) == ["boat", "one"]


def test_the_list_has_a_limit() -> None:
    assert len(terms(SEA + KITCHEN, count=3)) == 3


def test_rare_words_are_forgotten_and_common_ones_are_not() -> None:
    texts = [f"boat sail {'x' * (3 + i)}" for i in range(300)]
    words = WordCounts(texts, most_words=20)
    assert words.documents == 300
    assert len(list(words.items())) <= 20
    assert 250 < words["boat"] <= 300
    assert words["xxxx"] == 0
    assert top_terms(WordCounts(texts[:9]), words)[0] in {"boat", "sail", "xxx"}
