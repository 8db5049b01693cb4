"""From statistics of an image to a p-value: "is this image normal?" with a false-alarm rate that holds.

numpy alone, no torch: training fits and calibrates with it, and the API process answers with it.

    complexity      how well an image compresses, which no model is needed for
    detectors       one number from many statistics, fitted on normal images only
    features        how unusual a vector of hundreds of numbers is
    combination     one number from several: detectors, features, models
    conformal       p-values, thresholds and what is known of the true false-alarm rate
    heatmaps        where in an image, measured by normal images
    calibration     all of it in a file
    ensembles       several models' statistics, calibrated as one
    drift           whether the images that come are still like those of the calibration
    sizes           how many images a promise takes
"""
