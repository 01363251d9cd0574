{{- define "concertina.fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "concertina.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "concertina.labels" -}}
{{ include "concertina.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "concertina.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (ternary (include "concertina.fullname" .) "default" .Values.serviceAccount.create) -}}
{{- end -}}

{{- define "concertina.image" -}}
{{- $tag := printf "%s%s" .Chart.AppVersion (ternary "-gpu" "" .Values.gpu.enabled) -}}
{{- printf "%s:%s" .Values.image.repository (.Values.image.tag | default $tag) -}}
{{- end -}}

{{- define "concertina.modelFolder" -}}
{{- printf "/models/%s" (.Values.model.name | default (base .Values.model.source | trimSuffix ".gguf")) -}}
{{- end -}}

{{- define "concertina.modelImage" -}}
{{- $tag := printf "%s-convert" .Chart.AppVersion -}}
{{- printf "%s:%s" (.Values.model.image.repository | default .Values.image.repository) (.Values.model.image.tag | default $tag) -}}
{{- end -}}

{{- /* A probe of the whole server: (list context name-of-probe) */ -}}
{{- define "concertina.probe" -}}
{{- $values := (index . 0).Values -}}
{{- if $values.tls.secret -}}
httpGet:
  path: /healthz
  port: metrics
{{- else -}}
grpc:
  port: {{ $values.server.port }}
{{- end }}
{{ toYaml (index $values.probes (index . 1)) }}
{{- end -}}

{{- /* A probe of the gateway: (list context path name-of-probe). It has no certificate to show. */ -}}
{{- define "concertina.gatewayProbe" -}}
{{- $values := (index . 0).Values -}}
{{- if $values.tls.clientSecret -}}
tcpSocket:
  port: http
{{- else -}}
httpGet:
  path: {{ index . 1 }}
  port: http
  scheme: {{ ternary "HTTPS" "HTTP" (ne $values.tls.secret "") }}
{{- end }}
{{ toYaml (index $values.probes (index . 2)) }}
{{- end -}}
