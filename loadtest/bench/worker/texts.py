"""The texts of the benchmark: English sentences of about 8 to 60 tokens, the same on every machine.

Grammatical rather than meaningful: the time of an embedding depends on the number of tokens, not on what they say.
"""
import random

COUNT = 320  # whole batches of 32, so that every batch size sees the same texts
SEED = 20240601
WORDS = (4, 46)  # fewest and most words asked for; the last clause may run over a little

DETERMINERS = "the a this every another our their one".split()
ADJECTIVES = """old small quiet bright careful distant heavy early strange useful northern broken public simple warm
narrow patient expensive familiar wooden""".split()
NOUNS = """river teacher engine market garden letter bridge doctor window machine village captain library contract
station picture customer mountain kitchen network report valley journalist harbor recipe committee satellite
orchard telescope neighbour invoice violin""".split()
VERBS = """crossed repaired described followed measured painted carried delayed opened questioned remembered sold
watched improved ignored delivered inspected borrowed""".split()
PLACES = """near behind across beside above inside under beyond toward around""".split()
ADVERBS = "slowly often quietly finally rarely carefully suddenly never again together".split()
JOINTS = [", and", ", but", ", because", " while", ", although", ", so", " before", " after"]


def noun_phrase(rng):
    adjectives = rng.sample(ADJECTIVES, rng.choice([0, 0, 1, 1, 2]))
    return [rng.choice(DETERMINERS), *adjectives, rng.choice(NOUNS)]


def clause(rng):
    words = noun_phrase(rng) + [rng.choice(VERBS)] + noun_phrase(rng)
    if rng.random() < 0.5:
        words += [rng.choice(PLACES), *noun_phrase(rng)]
    if rng.random() < 0.4:
        words.append(rng.choice(ADVERBS))
    return words


def sentence(rng):
    wanted = rng.randint(*WORDS)
    words = clause(rng)
    while len(words) < wanted:
        joint = rng.choice(JOINTS)
        punctuation, word = ("," if joint[0] == "," else ""), joint.strip(", ")
        words[-1] += punctuation
        words += [word, *clause(rng)]
    return " ".join(words).capitalize() + rng.choice([".", ".", ".", "?"])


def texts():
    rng = random.Random(SEED)
    return [sentence(rng) for _ in range(COUNT)]


if __name__ == "__main__":
    print("\n".join(texts()))
