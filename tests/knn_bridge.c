/* SPDX-License-Identifier: Apache-2.0
 *
 * Stands in for the k-NN plugin's native library, which is not published with the plugin's zip. All it does is keep the
 * training vectors the plugin hands over and, when asked to train, send them to the test process (knn_bridge.py) and
 * return the bytes that come back. What the plugin does around that (validation, model document, states, cluster
 * metadata) is the plugin's own. Indexing and searching vectors need the real library: those functions are not here.
 */
#include <arpa/inet.h>
#include <jni.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#define FAISS(type, name) JNIEXPORT type JNICALL Java_org_opensearch_knn_jni_FaissService_##name
#define COMMONS(type, name) JNIEXPORT type JNICALL Java_org_opensearch_knn_jni_JNICommons_##name

typedef struct {
    size_t size;
    char *bytes;
} Vectors;

static void throw(JNIEnv *env, const char *message) {
    if (!(*env)->ExceptionCheck(env)) (*env)->ThrowNew(env, (*env)->FindClass(env, "java/lang/Exception"), message);
}

/* Appends the rows of a byte[][] or float[][]; address 0 means that there are none so far. */
static jlong store(JNIEnv *env, jlong address, jobjectArray rows, size_t width, jboolean append) {
    Vectors *vectors = address ? (Vectors *)address : calloc(1, sizeof(Vectors));
    if (!append) vectors->size = 0;
    for (jsize i = 0; i < (*env)->GetArrayLength(env, rows); i++) {
        jarray row = (*env)->GetObjectArrayElement(env, rows, i);
        jsize length = (*env)->GetArrayLength(env, row);
        vectors->bytes = realloc(vectors->bytes, vectors->size + length * width);
        char *end = vectors->bytes + vectors->size;
        if (width == sizeof(jfloat)) (*env)->GetFloatArrayRegion(env, row, 0, length, (jfloat *)end);
        else (*env)->GetByteArrayRegion(env, row, 0, length, (jbyte *)end);
        vectors->size += length * width;
        (*env)->DeleteLocalRef(env, row);
    }
    return (jlong)vectors;
}

static void release(jlong address) {
    if (!address) return;
    free(((Vectors *)address)->bytes);
    free((Vectors *)address);
}

/* The parameters are nested maps. OpenSearch has a JSON writer; it is on the plugin's class path. */
static jstring to_json(JNIEnv *env, jobject map) {
    jclass factory = (*env)->FindClass(env, "org/opensearch/common/xcontent/XContentFactory");
    jclass builder = (*env)->FindClass(env, "org/opensearch/core/xcontent/XContentBuilder");
    if (!factory || !builder) return NULL;
    jmethodID create = (*env)->GetStaticMethodID(env, factory, "jsonBuilder", "()Lorg/opensearch/core/xcontent/XContentBuilder;");
    jmethodID write = (*env)->GetMethodID(env, builder, "map", "(Ljava/util/Map;)Lorg/opensearch/core/xcontent/XContentBuilder;");
    jmethodID print = (*env)->GetMethodID(env, builder, "toString", "()Ljava/lang/String;");
    if (!create || !write || !print) return NULL;
    jobject json = (*env)->CallStaticObjectMethod(env, factory, create);
    if (json) json = (*env)->CallObjectMethod(env, json, write, map);
    return json ? (*env)->CallObjectMethod(env, json, print) : NULL;
}

/* Request: a line `kind dimension bytes-of-json bytes-of-vectors`, the JSON, the vectors.
 * Answer: a line `trained bytes` or `failed bytes`, then the index or the reason. */
static jbyteArray train(JNIEnv *env, const char *kind, jobject parameters, jint dimension, jlong address) {
    Vectors none = {0, NULL}, *vectors = address ? (Vectors *)address : &none;
    jstring json = to_json(env, parameters);
    if ((*env)->ExceptionCheck(env)) return NULL;

    const char *port = getenv("KNN_BRIDGE_PORT");
    struct sockaddr_in where = {.sin_family = AF_INET, .sin_port = htons(port ? atoi(port) : 0)};
    where.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int connection = socket(AF_INET, SOCK_STREAM, 0);
    if (connection < 0 || connect(connection, (struct sockaddr *)&where, sizeof where)) {
        if (connection >= 0) close(connection);
        throw(env, "the test process does not answer the k-NN bridge");
        return NULL;
    }
    FILE *out = fdopen(dup(connection), "w"), *in = fdopen(connection, "r");
    const char *text = (*env)->GetStringUTFChars(env, json, NULL);
    jsize text_size = (*env)->GetStringUTFLength(env, json);
    fprintf(out, "%s %d %d %zu\n", kind, (int)dimension, (int)text_size, vectors->size);
    fwrite(text, 1, text_size, out);
    fwrite(vectors->bytes, 1, vectors->size, out);
    fclose(out);
    (*env)->ReleaseStringUTFChars(env, json, text);

    char state = 0, newline = 0;
    size_t size = 0;
    char *answer = NULL;
    jbyteArray index = NULL;
    if (fscanf(in, "%c%*s %zu%c", &state, &size, &newline) == 3) answer = calloc(1, size + 1);
    if (!answer || fread(answer, 1, size, in) != size) throw(env, "the test process ended while it trained");
    else if (state != 't') throw(env, answer);
    else if ((index = (*env)->NewByteArray(env, size))) (*env)->SetByteArrayRegion(env, index, 0, size, (jbyte *)answer);
    free(answer);
    fclose(in);
    return index;
}

FAISS(void, initLibrary)(JNIEnv *env, jclass self) {}
FAISS(void, setMergeInterruptCallback)(JNIEnv *env, jclass self) {}

FAISS(jbyteArray, trainIndex)(JNIEnv *env, jclass self, jobject parameters, jint dimension, jlong vectors) {
    return train(env, "float", parameters, dimension, vectors);
}
FAISS(jbyteArray, trainByteIndex)(JNIEnv *env, jclass self, jobject parameters, jint dimension, jlong vectors) {
    return train(env, "byte", parameters, dimension, vectors);
}
FAISS(jbyteArray, trainBinaryIndex)(JNIEnv *env, jclass self, jobject parameters, jint dimension, jlong vectors) {
    return train(env, "binary", parameters, dimension, vectors);
}
FAISS(jlong, transferVectors)(JNIEnv *env, jclass self, jlong address, jobjectArray rows) {
    return store(env, address, rows, sizeof(jfloat), JNI_TRUE);
}

#define STORE(name, width)                                                                                           \
    COMMONS(jlong, name)(JNIEnv *env, jclass self, jlong address, jobjectArray rows, jlong capacity, jboolean append) { \
        return store(env, address, rows, width, append);                                                             \
    }
STORE(storeVectorData, sizeof(jfloat))
STORE(storeByteVectorData, 1)
STORE(storeBinaryVectorData, 1)

#define FREE(name) \
    COMMONS(void, name)(JNIEnv *env, jclass self, jlong address) { release(address); }
FREE(freeVectorData)
FREE(freeByteVectorData)
FREE(freeBinaryVectorData)
