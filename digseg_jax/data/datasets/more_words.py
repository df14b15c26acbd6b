# SPDX-License-Identifier: Apache-2.0
"""More words for the classes of the generalist's domains, beside those of the data sets' own lists.

A class that is trained under two names is known by these two; under eight, a ninth is understood more
often. Each line is as in a class list: the class's name, then other words for it. Left out on purpose
are the synonyms that tests/bench/words.py asks with, so that its figures are about unseen words.
"""

from __future__ import annotations

from collections.abc import Mapping

_CROPS = (
    "soil, bare soil, earth, dirt, field soil, bare ground",
    "crop, crop seedling, crop leaves, young crop, planted crop, vegetable plant",
    "weed, weeds, wild plant, undesired plant, weed seedling, invasive plant",
)
_NUCLEI = ("nucleus, nuclei of cells, stained nucleus, stained nuclei, nucleus of a cell, cell kernel",)

MORE_WORDS: Mapping[str, tuple[str, ...]] = {
    "photos_coco128": (
        "person, people, man, woman, child, human",
        "bicycle, bike, pushbike",
        "car, motorcar, sedan, passenger car",
        "motorcycle, motor bike, scooter",
        "airplane, plane, aircraft, airliner, jet",
        "bus, coach, city bus",
        "train, railway train, rail car",
        "truck, lorry, pickup truck",
        "boat, rowboat, motorboat, vessel",
        "bird, wild bird",
        "cat, house cat, feline, tabby",
        "dog, hound, canine, pet dog",
        "horse, mare, stallion",
        "sheep, ewe, ram",
        "cow, bull, calf, ox",
        "pizza, slice of pizza, pepperoni pizza",
        "bed, mattress, bed frame",
        "couch, divan, loveseat",
        "tv, tv set, television screen",
        "bottle, flask, water bottle",
        "chair, seat, armchair",
        "dining table, table, kitchen table",
        "potted plant, pot plant, plant in a pot",
    ),
    "photos_voc": (
        "aeroplane, plane, aircraft, airliner, jet",
        "bicycle, pushbike, cycle",
        "bird, wild bird",
        "boat, rowboat, motorboat, sailing boat, vessel",
        "bottle, flask, water bottle",
        "bus, coach, city bus",
        "car, motorcar, sedan, passenger car",
        "cat, house cat, feline, tabby",
        "chair, seat, armchair",
        "cow, bull, calf, ox",
        "diningtable, table, kitchen table",
        "dog, hound, canine, pet dog",
        "horse, mare, stallion",
        "motorbike, motor bike, scooter",
        "person, people, man, woman, child, human",
        "pottedplant, pot plant, plant in a pot, house plant",
        "sheep, ewe, ram",
        "sofa, divan, loveseat",
        "train, railway train, rail car",
        "tvmonitor, tv, computer monitor, screen",
    ),
    "fashion_ccp": (
        "hair, head hair, hairstyle, haircut",
        "dress, frock, sundress, evening dress",
        "pants, long pants, chinos, pair of trousers",
        "shoes, pair of shoes, shoe",
        "skin, human skin, naked skin, face and arms",
        "jacket, leather jacket, denim jacket, short coat",
        "shirt, dress shirt, collared shirt",
        "coat, overcoat, winter coat, trench coat",
        "bag, handbag, shoulder bag",
        "skirt, miniskirt, pleated skirt",
        "jeans, denim pants, blue jeans",
    ),
    "camvid": (
        "sky, blue sky, cloudy sky, skies, open sky",
        "building, buildings, facade, architecture, tower block, wall of a building",
        "pole, lamp post, pylon, street pole, mast",
        "road, driving lane, carriageway, asphalt road, lane",
        "pavement, walkway, sidewalk for pedestrians, footway",
        "tree, trees, leaves, bush, treetop",
        "sign symbol, road sign, street sign, signboard, traffic light",
        "fence, fencing, railing, barrier, hedge fence",
        "car, cars, motorcar, van, parked car",
        "pedestrian, pedestrians, people, walker, passer-by",
        "bicyclist, bicycle rider, person on a bicycle, cycling person",
    ),
    "nuclei_dsb2018": _NUCLEI,
    "nuclei_monuseg": _NUCLEI,
    "cells_wbc": (
        "cytoplasm, cell cytoplasm, cell body, cell plasma, leukocyte cytoplasm",
        "nucleus, cell nucleus, nucleus of a white blood cell, nucleus of a leucocyte, cell kernel",
    ),
    "retina_drishti": (
        "optic disc rim, disc rim, rim of the optic nerve head, outer rim of the optic disc, "
        "disc margin",
        "optic cup, cup of the optic nerve head, cup of the optic disc, optic nerve cup, central cup",
    ),
    "retina_disc": (
        "optic disc, optic disk, optic nerve, disc of the optic nerve, blind spot, optic nerve disc",
    ),
    "retina_vessels": (
        "blood vessel, blood vessels, retinal blood vessels, vein, veins and arteries, vasculature",
    ),
    "roads_epfl": ("road, roads, paved road, highway, streets, road surface, asphalt road",),
    "crops_cwfid": _CROPS,
    "crops_carrots": _CROPS,
    "pavement_cracks": (
        "pavement, blacktop, asphalt pavement, road pavement, concrete surface, paved surface",
        "crack, cracks, cracking, surface crack, fracture, split in the pavement",
    ),
}
