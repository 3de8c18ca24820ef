"""Greedy k-center (arXiv 1708.00489) with every distance computed anew at every step."""

import itertools
import math


def distance(a, b):
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))


def order(points, first=None):
    """Indices, each the farthest from its nearest predecessor; the first the nearest to the mean, unless given."""
    mean = [sum(column) / len(points) for column in zip(*points, strict=True)]
    chosen = [min(range(len(points)), key=lambda i: distance(points[i], mean)) if first is None else first]
    while len(chosen) < len(points):
        rest = [i for i in range(len(points)) if i not in chosen]
        chosen.append(max(rest, key=lambda i: min(distance(points[i], points[j]) for j in chosen)))
    return chosen


def radius(points, centres):
    return max(min(distance(point, points[j]) for j in centres) for point in points)


def best_radius(points, count):
    return min(radius(points, centres) for centres in itertools.combinations(range(len(points)), count))
